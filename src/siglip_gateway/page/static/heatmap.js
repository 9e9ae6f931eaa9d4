// The tab Heatmap: where in a picture does the score of each prompt come from?

import { ask } from "./api.js";
import { runOnChange } from "./classify.js";
import { showRequest } from "./code.js";
import { chosen, el, lines, part } from "./dom.js";
import { floatsOf, largest, paintLegend, paintMap } from "./maps.js";
import { Picker } from "./pictures.js";
import { Missing, Run } from "./run.js";

const MEANING = "against · 0 · for the prompt";

/** Set the panel up for the picture of `subject`. */
export function setUpHeatmap(panel, subject) {
  const prompts = part(panel, "prompts");
  const background = part(panel, "background");
  const templates = part(panel, "templates");
  const view = new View(panel);
  new Picker(part(panel, "picker"), subject);

  function request() {
    if (!subject.picture) throw new Missing("Choose a picture first.");
    if (!lines(prompts).length) throw new Missing("Write at least one prompt.");
    const mode = chosen(panel, "heatmap-mode");
    const body = { image: subject.picture, prompts: lines(prompts), mode, encoding_format: "base64" };
    if (lines(templates).length) body.templates = lines(templates);
    if (mode === "relative" && lines(background).length) body.background = lines(background);
    return body;
  }

  const run = new Run(
    panel,
    async () => {
      const body = request();
      showRequest(part(panel, "request"), "/explain", body);
      return { answer: await ask("/explain", body), picture: body.image };
    },
    ({ answer, picture }) => view.show(answer, picture),
  );

  function modeChanged() {
    part(panel, "background-field").hidden = chosen(panel, "heatmap-mode") !== "relative";
    if (subject.picture) run.start();
  }

  runOnChange(run, subject, panel, [prompts, background, templates]);
  for (const option of panel.querySelectorAll('[name="heatmap-mode"]')) {
    option.addEventListener("change", modeChanged);
  }
}

// The result: a large map, and a list of prompts to choose from.
class View {
  constructor(panel) {
    this.panel = panel;
    this.canvas = part(panel, "map");
    this.image = part(panel, "image");
    this.opacity = part(panel, "opacity");
    this.readout = part(panel, "readout");
    this.selected = 0;
    paintLegend(part(panel, "legend"));
    this.opacity.addEventListener("input", () => this.fade());
    for (const option of panel.querySelectorAll('[name="heatmap-scale"]')) {
      option.addEventListener("change", () => this.paint());
    }
    this.canvas.addEventListener("pointermove", (event) => this.tell(event));
    this.readout.textContent = MEANING;
    this.canvas.addEventListener("pointerleave", () => (this.readout.textContent = MEANING));
    this.fade();
  }

  show(answer, picture) {
    [this.height, this.width] = answer.image_size;
    this.maps = answer.heatmaps.map(floatsOf);
    this.prompts = answer.prompts;
    this.unattributed = answer.unattributed;
    this.scores = answer.scores;
    this.selected = Math.min(this.selected, this.maps.length - 1);
    this.image.src = picture.url;
    this.image.alt = `The picture ${picture.name} in grey, under the map`;
    this.list();
    this.paint();
    const best = this.scores.indexOf(Math.max(...this.scores));
    return `${this.prompts[best]} has the highest score, ${this.scores[best].toFixed(3)}`;
  }

  fade() {
    this.canvas.style.opacity = this.opacity.value;
    part(this.panel, "opacity-value").textContent = `${Math.round(this.opacity.value * 100)} %`;
  }

  limit(index) {
    const each = chosen(this.panel, "heatmap-scale") === "each";
    return largest(each ? [this.maps[index]] : this.maps);
  }

  list() {
    const most = Math.max(...this.scores.map(Math.abs));
    this.buttons = this.prompts.map((prompt, index) => {
      const bar = el("span", { class: this.scores[index] < 0 ? "fill against" : "fill" });
      bar.style.inlineSize = `${(Math.abs(this.scores[index]) / most) * 100}%`;
      return el(
        "button",
        { type: "button", class: "prompt", click: () => this.select(index) },
        el("canvas", { "aria-hidden": "true" }),
        el("span", { class: "prompt-name", text: prompt }),
        el("span", { class: "prompt-score", text: this.scores[index].toFixed(3) }),
        el("span", { class: "track", "aria-hidden": "true" }, bar),
      );
    });
    part(this.panel, "scores").replaceChildren(...this.buttons.map((button) => el("li", {}, button)));
  }

  select(index) {
    this.selected = index;
    this.paint();
  }

  paint() {
    if (!this.maps) return;
    const { selected, width, height } = this;
    this.buttons.forEach((button, index) => {
      button.setAttribute("aria-pressed", String(index === selected));
      paintMap(button.querySelector("canvas"), this.maps[index], width, height, this.limit(index));
    });
    const limit = this.limit(selected);
    paintMap(this.canvas, this.maps[selected], width, height, limit);
    this.canvas.setAttribute("aria-label", `Heatmap of ${this.prompts[selected]}: ${this.summary(selected)}`);
    part(this.panel, "prompt").textContent = this.prompts[selected];
    part(this.panel, "rest").textContent =
      `Score ${this.scores[selected].toFixed(3)}: ` +
      `${number(this.scores[selected] - this.unattributed[selected])} from the map, ` +
      `${number(this.unattributed[selected])} without a place`;
    part(this.panel, "least").textContent = number(-limit);
    part(this.panel, "most").textContent = number(limit);
  }

  // Where the map is strongest, in words.
  summary(index) {
    const map = this.maps[index];
    const place = map.reduce((best, value, at) => (value > map[best] ? at : best), 0);
    const across = Math.floor(((place % this.width) / this.width) * 3);
    const down = Math.floor((Math.floor(place / this.width) / this.height) * 3);
    return `strongest at the ${["top", "middle", "bottom"][down]} ${["left", "centre", "right"][across]}`;
  }

  tell(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = Math.min(this.width - 1, Math.floor(((event.clientX - box.left) / box.width) * this.width));
    const y = Math.min(this.height - 1, Math.floor(((event.clientY - box.top) / box.height) * this.height));
    if (x < 0 || y < 0) return;
    this.readout.textContent = `here ${number(this.maps[this.selected][y * this.width + x])}`;
  }
}

// Parts of a cosine are small: three digits that say something.
function number(value) {
  const text = Math.abs(value).toPrecision(2);
  return `${value < 0 ? "−" : "+"}${text}`;
}
