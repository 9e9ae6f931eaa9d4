// A frame and its boxes: drawn with the mouse or a finger, or written as JSON.

import { part } from "./dom.js";
import { Picker, Subject } from "./pictures.js";

const SVG = "http://www.w3.org/2000/svg";
const LEAST = 4; // pixels of a box that is drawn

/** A frame with boxes. `changed` is called when either changes. */
export class FrameBoxes {
  constructor(root, stage, changed) {
    this.stage = stage;
    this.changed = changed;
    this.field = part(root, "boxes");
    this.message = part(root, "boxes-message");
    this.image = part(stage, "frame-image");
    this.drawing = part(stage, "frame-boxes");
    this.subject = new Subject();
    this.labels = [];
    new Picker(part(root, "picker"), this.subject, { label: "Frame", samples: [] });
    this.subject.addEventListener("change", () => this.update());
    this.image.addEventListener("load", () => this.draw());
    this.field.addEventListener("input", () => this.edited());
    part(stage, "frame-clear").addEventListener("click", () => this.write([]));
    part(stage, "frame-undo").addEventListener("click", () => this.write(this.boxes.slice(0, -1)));
    this.setUpDrawing(part(stage, "frame-draw"));
  }

  /** The boxes as lists of four numbers. Throws an Error that names the box at fault. */
  get boxes() {
    const text = this.field.value.trim();
    if (!text) return [];
    let rows;
    try {
      rows = JSON.parse(text);
    } catch (problem) {
      throw new Error(`The boxes are not JSON: ${problem.message}`);
    }
    if (!Array.isArray(rows)) throw new Error("The boxes are no list.");
    return rows.map((row, index) => {
      const box = Array.isArray(row) ? row : [row?.x0, row?.y0, row?.x1, row?.y1];
      if (box.length !== 4 || !box.every(Number.isFinite)) {
        throw new Error(`Box ${index}: expected [x0, y0, x1, y1] or an object of these names`);
      }
      return box;
    });
  }

  /** The tracks, if all boxes are objects with track_id, else null. */
  get tracks() {
    const rows = JSON.parse(this.field.value);
    return rows.length && rows.every((row) => Number.isInteger(row.track_id)) ? rows.map((row) => row.track_id) : null;
  }

  set(picture, boxes) {
    this.field.value = listed(boxes);
    this.subject.set(picture);
  }

  /** Colour the boxes by group: a name of a class per box. */
  paint(labels) {
    this.labels = labels;
    this.draw();
  }

  write(boxes) {
    this.field.value = listed(boxes);
    this.edited();
  }

  edited() {
    this.labels = [];
    this.draw();
    this.changed();
  }

  update() {
    const { picture } = this.subject;
    this.stage.hidden = !picture;
    this.labels = [];
    if (picture) {
      this.image.src = picture.url;
      this.image.alt = `The frame ${picture.name}`;
    }
    this.changed();
  }

  draw() {
    let boxes = [];
    try {
      boxes = this.boxes;
      this.message.textContent = "";
    } catch (problem) {
      this.message.textContent = problem.message;
    }
    this.drawing.setAttribute("viewBox", `0 0 ${this.image.naturalWidth || 1} ${this.image.naturalHeight || 1}`);
    this.drawing.replaceChildren(...boxes.map((box, index) => rectangle(box, this.labels[index])));
    part(this.stage, "frame-count").textContent = boxes.length === 1 ? "1 box" : `${boxes.length} boxes`;
  }

  setUpDrawing(button) {
    let begin = null;
    const canvas = this.drawing;
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      canvas.classList.toggle("drawing", on);
    });
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * this.image.naturalWidth;
      const y = ((event.clientY - box.top) / box.height) * this.image.naturalHeight;
      return [Math.round(x), Math.round(y)];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (!canvas.classList.contains("drawing")) return;
      begin = place(event);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!begin) return;
      canvas.querySelector(".new")?.remove();
      canvas.append(rectangle(span(begin, place(event)), "new"));
    });
    canvas.addEventListener("pointercancel", () => (begin = null));
    canvas.addEventListener("pointerup", (event) => {
      if (!begin) return;
      const box = span(begin, place(event));
      begin = null;
      canvas.querySelector(".new")?.remove();
      if (box[2] - box[0] >= LEAST && box[3] - box[1] >= LEAST) this.write([...this.boxes, box]);
    });
  }
}

const listed = (boxes) => (boxes.length ? `[\n${boxes.map((box) => `  ${JSON.stringify(box)}`).join(",\n")}\n]` : "");

const span = ([x0, y0], [x1, y1]) => [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];

function rectangle([x0, y0, x1, y1], name = "") {
  const node = document.createElementNS(SVG, "rect");
  const place = { x: x0, y: y0, width: Math.max(0, x1 - x0), height: Math.max(0, y1 - y0), rx: 3, class: name };
  for (const [key, value] of Object.entries(place)) node.setAttribute(key, value);
  return node;
}
