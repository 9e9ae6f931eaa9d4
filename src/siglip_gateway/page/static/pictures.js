// Choosing a picture: file, drop, paste, camera or sample. Files are sent as they are.

import { el, fromTemplate, newId, part } from "./dom.js";

/** An image file, as a data URI in JSON. */
export class Picture {
  /** @param path where a user finds the file, for the request as code. */
  constructor(file, uri, path) {
    this.file = file;
    this.name = file.name || "pasted.png";
    this.path = path ?? this.name;
    this.uri = uri;
    this.url = URL.createObjectURL(file);
  }

  toJSON() {
    return this.uri;
  }
}

/** Read a file without changing it. */
export function readPicture(file, path) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(new Picture(file, reader.result, path)));
    reader.addEventListener("error", () => reject(new Error(`${file.name}: the browser cannot read this file`)));
    reader.readAsDataURL(file);
  });
}

/** A sample that the gateway serves. */
export async function readSample(name, folder = "checkpoints/siglip-tiny/samples") {
  const answer = await fetch(`/page/samples/${name}`);
  const blob = await answer.blob();
  return readPicture(new File([blob], name, { type: blob.type }), `${folder}/${name}`);
}

/** A picture that several panels share: choosing it in one shows it in all. */
export class Subject extends EventTarget {
  picture = null;

  set(picture) {
    this.picture = picture;
    this.dispatchEvent(new Event("change"));
  }
}

const SAMPLES = [
  ["dog.jpg", "dog"],
  ["penguin.png", "penguin"],
  ["elephant.jpg", "elephant"],
  ["guitar.jpg", "guitar"],
  ["pizza.jpg", "pizza"],
  ["automobile.jpg", "car"],
  ["scene.jpg", "scene of three things"],
];

const pickers = [];

/** Lets the user choose the picture of a subject. */
export class Picker {
  /**
   * @param root the element that is filled.
   * @param options `label` names the picture, `samples` are names of samples or null for all.
   */
  constructor(root, subject, { label = "Picture", samples = null } = {}) {
    this.root = root;
    this.subject = subject;
    const content = fromTemplate("picker");
    root.replaceChildren(content);
    this.parts = Object.fromEntries(
      ["drop", "invite", "preview", "message", "name", "remove", "file", "camera", "samples"].map((name) => [
        name,
        part(root, name),
      ]),
    );
    const id = newId("picker");
    content.setAttribute("role", "group");
    content.setAttribute("aria-label", label);
    this.parts.message.id = id;
    this.parts.file.setAttribute("aria-describedby", id);
    for (const input of [this.parts.file, this.parts.camera]) {
      input.addEventListener("change", () => this.take(input.files[0], input));
    }
    this.parts.remove.addEventListener("click", () => {
      subject.set(null);
      this.parts.file.focus();
    });
    this.parts.preview.addEventListener("error", () => {
      if (this.subject.picture) this.say("This browser cannot show the file. The server may still read it.");
    });
    acceptDrops(this.parts.drop, (files) => this.take(files[0]));
    this.addSamples(samples);
    subject.addEventListener("change", () => this.update());
    pickers.push(this);
    this.update();
  }

  get visible() {
    return this.root.offsetParent !== null;
  }

  async take(file, input) {
    if (!file) return;
    this.say("");
    try {
      this.subject.set(await readPicture(file));
    } catch (problem) {
      this.say(problem.message);
    }
    if (input) input.value = "";
  }

  say(text) {
    this.parts.message.textContent = text;
  }

  update() {
    const { picture } = this.subject;
    const { preview, invite, name, remove, drop } = this.parts;
    preview.hidden = !picture;
    invite.hidden = Boolean(picture);
    remove.hidden = !picture;
    drop.classList.toggle("filled", Boolean(picture));
    name.textContent = picture ? `${picture.name}, ${size(picture.file.size)}` : "";
    this.say("");
    if (picture) {
      preview.src = picture.url;
      preview.alt = `The chosen picture, ${picture.name}`;
    } else {
      preview.removeAttribute("src");
    }
    for (const button of this.parts.samples.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(picture?.name === button.dataset.name));
    }
  }

  addSamples(names) {
    for (const [name, title] of SAMPLES) {
      if (names && !names.includes(name)) continue;
      const image = el("img", { src: `/page/samples/${name}`, alt: "", width: 44, height: 44, loading: "lazy" });
      const label = `Sample: ${title}`;
      const button = el(
        "button",
        { type: "button", class: "sample", "aria-label": label, title: label, "data-name": name },
        image,
      );
      button.addEventListener("click", async () => this.subject.set(await readSample(name)));
      this.parts.samples.append(button);
    }
  }
}

/** Call `taken` with the files that are dropped on an element. */
export function acceptDrops(target, taken) {
  target.addEventListener("dragover", (event) => {
    event.preventDefault();
    target.classList.add("over");
  });
  target.addEventListener("dragleave", () => target.classList.remove("over"));
  target.addEventListener("drop", (event) => {
    event.preventDefault();
    target.classList.remove("over");
    taken([...event.dataTransfer.files], event.dataTransfer);
  });
}

/** A number of bytes for people. */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${Math.round(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// A pasted picture goes to the picker that has the focus, else to the first empty one that is visible.
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])][0];
  const visible = pickers.filter((picker) => picker.visible);
  if (!file || !visible.length) return;
  event.preventDefault();
  const target =
    visible.find((picker) => picker.root.contains(document.activeElement)) ??
    visible.find((picker) => !picker.subject.picture) ??
    visible[0];
  target.take(file);
});

// A file that misses a drop zone must not replace the page.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
