// Crops of players: files and folders that the user drops or chooses, and the tracks in their names.

import { el, part } from "./dom.js";
import { acceptDrops, readPicture } from "./pictures.js";

const IMAGE = /\.(avif|bmp|gif|jpe?g|png|tiff?|webp)$/i;
const order = new Intl.Collator("en", { numeric: true });

/** Lets the user choose many crops. `changed` is called when they are read. */
export class Crops {
  constructor(root, changed) {
    this.root = root;
    this.changed = changed;
    this.pictures = [];
    this.pattern = part(root, "pattern");
    for (const name of ["files", "folder"]) {
      const input = part(root, name);
      input.addEventListener("change", () => this.take([...input.files], input));
    }
    acceptDrops(part(root, "crops-drop"), async (files, transfer) => {
      // Entries are only readable before the first wait.
      const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
      this.take(entries.length ? await filesOf(entries) : files);
    });
    this.pattern.addEventListener("input", () => this.tell());
  }

  async take(files, input) {
    const images = files.filter((file) => IMAGE.test(file.name));
    images.sort((first, second) => order.compare(pathOf(first), pathOf(second)));
    this.say(images.length ? `Reading ${images.length} files …` : "There is no image file among them.");
    this.pictures = await Promise.all(images.map((file) => readPicture(file, pathOf(file))));
    if (input) input.value = "";
    if (images.length) this.tell();
    this.changed();
  }

  /** The track of each crop as a number, -1 where the name has none, or null if no name has one. */
  get tracks() {
    const pattern = this.expression;
    if (!pattern) return null;
    const names = this.pictures.map((picture) => {
      const found = pattern.exec(picture.path);
      return found ? (found[1] ?? found[0]) : "";
    });
    const known = [...new Set(names.filter(Boolean))];
    return known.length ? names.map((name) => known.indexOf(name)) : null;
  }

  get expression() {
    try {
      return this.pattern.value ? new RegExp(this.pattern.value) : null;
    } catch {
      return null;
    }
  }

  tell() {
    if (!this.pictures.length) return;
    const { tracks } = this;
    const wrong = this.pattern.value && !this.expression ? ", and the pattern is no regular expression" : "";
    const count = tracks ? `${new Set(tracks.filter((track) => track >= 0)).size} tracks` : "no tracks";
    this.say(`${this.pictures.length} crops, ${count} in their names${wrong}`);
    part(this.root, "strip").replaceChildren(
      ...this.pictures.slice(0, 24).map((picture) => el("img", { src: picture.url, alt: "" })),
    );
  }

  say(text) {
    part(this.root, "crops-message").textContent = text;
  }
}

const pathOf = (file) => file.path ?? (file.webkitRelativePath || file.name);

// All files of dropped entries, at any depth.
async function filesOf(entries) {
  const found = await Promise.all(entries.map(filesOfEntry));
  return found.flat();
}

async function filesOfEntry(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    file.path = entry.fullPath.replace(/^\//, "");
    return [file];
  }
  const reader = entry.createReader();
  const children = [];
  for (;;) {
    // A call returns a part of the folder, and nothing at its end.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return filesOf(children);
    children.push(...some);
  }
}
