// The tab Search: which pictures of a collection fit a text or a picture?

import { ask, pictureUrl } from "./api.js";
import { showRequest } from "./code.js";
import { chosen, copyButton, el, part } from "./dom.js";
import { Picker, Subject } from "./pictures.js";
import { Missing, Run } from "./run.js";

/** Set the panel up. The returned function looks whether there is a collection. */
export function setUpSearch(panel) {
  const subject = new Subject();
  const words = part(panel, "text");
  const count = part(panel, "count");
  new Picker(part(panel, "picker"), subject);
  const isText = () => chosen(panel, "search-kind") === "text";

  function input() {
    if (isText()) {
      if (!words.value.trim()) throw new Missing("Write what to look for.");
      return { text: words.value.trim() };
    }
    if (!subject.picture) throw new Missing("Choose a picture first.");
    return { image: subject.picture };
  }

  const run = new Run(
    panel,
    async () => {
      const body = { input: input(), k: count.valueAsNumber || 12 };
      showRequest(part(panel, "request"), "/search", body);
      return ask("/search", body);
    },
    ({ results }) => {
      part(panel, "hits").replaceChildren(...results.map(hit));
      return `${results.length} pictures, the first is ${results[0]?.name ?? "none"}`;
    },
  );
  words.addEventListener("keydown", (event) => event.key === "Enter" && run.start());
  subject.addEventListener("change", () => subject.picture && run.start());
  for (const option of panel.querySelectorAll('[name="search-kind"]')) {
    option.addEventListener("change", () => {
      part(panel, "as-text").hidden = !isText();
      part(panel, "picker").hidden = isText();
    });
  }
  for (const step of panel.querySelectorAll("[data-command]")) {
    step.append(copyButton("Copy", () => step.querySelector("code").textContent));
  }
  return () => look(panel);
}

async function look(panel) {
  const told = part(panel, "collection");
  try {
    const { available, count, dimensions, reason } = await ask("/search");
    part(panel, "none").hidden = available;
    part(panel, "some").hidden = !available;
    told.textContent = `${count.toLocaleString("en")} vectors of ${dimensions} dimensions`;
    part(panel, "reason").textContent = reason ?? "";
  } catch (problem) {
    part(panel, "none").hidden = false;
    part(panel, "some").hidden = true;
    part(panel, "reason").textContent = problem.message;
  }
}

function hit({ name, score, image }) {
  const frame = el("div", { class: "hit-image" }, image ? null : el("span", { class: "muted", text: "no picture" }));
  if (image) {
    pictureUrl(image).then(
      (url) => frame.replaceChildren(el("img", { src: url, alt: name })),
      (problem) => frame.replaceChildren(el("span", { class: "muted", text: problem.message })),
    );
  }
  return el(
    "li",
    { class: "hit" },
    frame,
    el("span", { class: "hit-name", text: name.split("/").at(-1), title: name }),
    el("span", { class: "hit-score", text: score.toFixed(3) }),
  );
}
