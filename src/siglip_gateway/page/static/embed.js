// The tab Embed: the vectors of one or two inputs, and their cosine.

import { ask } from "./api.js";
import { showRequest } from "./code.js";
import { chosen, copyButton, download, el, part } from "./dom.js";
import { Picker, Subject } from "./pictures.js";
import { Missing, Run } from "./run.js";

const SHOWN = 8;
const SIDES = ["a", "b"];

/** Set the panel up. The first input starts with the picture of `subject`. */
export function setUpEmbed(panel, subject) {
  const sides = SIDES.map((name) => new Side(part(panel, name), name, name === "a" ? subject : new Subject()));
  const run = new Run(
    panel,
    async () => {
      const given = sides.filter((side) => side.input);
      if (!given.length) throw new Missing("Choose a picture or write a text first.");
      const body = { input: given.map((side) => side.input) };
      showRequest(part(panel, "request"), "/v1/embeddings", body);
      const answer = await ask("/v1/embeddings", body);
      return given.map((side, index) => ({ title: side.title, vector: answer.data[index].embedding }));
    },
    (found) => {
      part(panel, "vectors").replaceChildren(...found.map(vectorCard));
      const both = found.length === 2;
      part(panel, "cosine").hidden = !both;
      if (!both) return `A vector of ${found[0].vector.length} values`;
      const value = cosine(found[0].vector, found[1].vector);
      showCosine(panel, value);
      return `The cosine is ${value.toFixed(3)}`;
    },
  );
  for (const side of sides) side.changed = () => !panel.hidden && run.start();
}

// One of the two inputs: a picture or a text.
class Side {
  constructor(root, name, subject) {
    this.root = root;
    this.name = name;
    this.subject = subject;
    this.changed = () => {};
    this.text = part(root, "text");
    new Picker(part(root, "picker"), subject, { label: `Picture ${name.toUpperCase()}` });
    subject.addEventListener("change", () => subject.picture && this.changed());
    this.text.addEventListener("change", () => this.changed());
    for (const kind of root.querySelectorAll('input[type="radio"]')) {
      kind.addEventListener("change", () => this.switch());
    }
    this.switch();
  }

  get isText() {
    return chosen(this.root, `embed-${this.name}`) === "text";
  }

  get input() {
    if (this.isText) return this.text.value.trim() ? { text: this.text.value.trim() } : null;
    return this.subject.picture ? { image: this.subject.picture } : null;
  }

  get title() {
    return this.isText ? this.text.value.trim() : this.subject.picture.name;
  }

  switch() {
    part(this.root, "as-text").hidden = !this.isText;
    part(this.root, "picker").hidden = this.isText;
  }
}

function cosine(first, second) {
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  return dot(first, second) / Math.sqrt(dot(first, first) * dot(second, second));
}

function showCosine(panel, value) {
  part(panel, "cosine-value").textContent = value.toFixed(3);
  part(panel, "cosine-mark").style.insetInlineStart = `${(value + 1) * 50}%`;
}

function vectorCard({ title, vector }) {
  const canvas = el("canvas", { class: "stripes", role: "img", "aria-label": `All ${vector.length} values as stripes` });
  paintStripes(canvas, vector);
  const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  const shown = vector.slice(0, SHOWN).map((value) => value.toFixed(4));
  const text = () => JSON.stringify(vector);
  const name = `${title.replace(/\.\w+$/, "").replace(/[^\w-]+/g, "-").slice(0, 40) || "vector"}.json`;
  return el(
    "section",
    { class: "vector", "aria-label": `Vector of ${title}` },
    el("h3", { text: title }),
    el("p", { class: "facts", text: `${vector.length} values, length ${length.toFixed(3)}` }),
    canvas,
    el("p", { class: "numbers", text: `${shown.join("  ")}  …` }),
    el(
      "div",
      { class: "actions" },
      copyButton("Copy as JSON", text),
      el("button", {
        type: "button",
        class: "quiet small",
        text: "Download",
        click: () => download(name, text(), "application/json"),
      }),
    ),
  );
}

// One stripe per value: teal above zero, amber below, stronger the larger.
function paintStripes(canvas, vector) {
  const most = Math.max(...vector.map(Math.abs)) || 1;
  canvas.width = vector.length;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  vector.forEach((value, index) => {
    const [red, green, blue] = value > 0 ? [15, 148, 136] : [217, 119, 6];
    context.fillStyle = `rgb(${red} ${green} ${blue} / ${Math.abs(value) / most})`;
    context.fillRect(index, 0, 1, 1);
  });
}
