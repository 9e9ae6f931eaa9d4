// The tab Classify: how probable is each label for a picture?

import { ask } from "./api.js";
import { showRequest } from "./code.js";
import { chosen, el, lines, part } from "./dom.js";
import { Picker } from "./pictures.js";
import { Missing, Run } from "./run.js";

/** Set the panel up for the picture of `subject`. */
export function setUpClassify(panel, subject) {
  const labels = part(panel, "labels");
  const templates = part(panel, "templates");
  new Picker(part(panel, "picker"), subject);

  function request() {
    if (!subject.picture) throw new Missing("Choose a picture first.");
    if (!lines(labels).length) throw new Missing("Write at least one label.");
    const body = {
      image: subject.picture,
      labels: lines(labels),
      softmax: chosen(panel, "classify-softmax") === "true",
    };
    return lines(templates).length ? { ...body, templates: lines(templates) } : body;
  }

  const run = new Run(
    panel,
    async () => {
      const body = request();
      showRequest(part(panel, "request"), "/classify", body);
      return ask("/classify", body);
    },
    (answer) => {
      const rows = answer.labels
        .map((label, index) => ({ label, value: answer.probabilities[index] }))
        .sort((first, second) => second.value - first.value);
      part(panel, "bars").replaceChildren(...rows.map(bar));
      return `${rows[0].label} is the most probable label, ${percent(rows[0].value)}`;
    },
  );

  runOnChange(run, subject, panel, [labels, templates]);
  for (const option of panel.querySelectorAll('[name="classify-softmax"]')) {
    option.addEventListener("change", () => subject.picture && run.start());
  }
}

/** Start a run when the visible panel's picture changes, and on Ctrl-Enter in a text field. */
export function runOnChange(run, subject, panel, fields) {
  subject.addEventListener("change", () => {
    if (subject.picture && !panel.hidden) run.start();
  });
  for (const field of fields) {
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run.start();
    });
  }
}

function bar({ label, value }, index) {
  const fill = el("span", { class: "fill" });
  fill.style.inlineSize = `${Math.max(value * 100, 0.4)}%`;
  return el(
    "li",
    { class: index === 0 ? "best" : null },
    el("span", { class: "bar-label", text: label }),
    el("span", { class: "bar-value", text: percent(value) }),
    el("span", { class: "track", "aria-hidden": "true" }, fill),
  );
}

function percent(value) {
  return value > 0 && value < 0.0005 ? "< 0.1 %" : `${(value * 100).toFixed(1)} %`;
}
