// Running a request from a panel: progress, the server's error, the result, and the request as code.

import { announce, el, part } from "./dom.js";
import { ApiError } from "./api.js";

/** Runs one kind of request of a panel. Of several that overlap, only the last one shows its result. */
export class Run {
  /**
   * @param panel has the parts `run` (a button), `status`, `error`, `empty` and `result`.
   * @param work returns the result.
   * @param show writes a result into the panel and returns a sentence for screen readers.
   */
  constructor(panel, work, show) {
    this.work = work;
    this.show = show;
    this.parts = Object.fromEntries(
      ["run", "status", "error", "empty", "result"].map((name) => [name, part(panel, name)]),
    );
    this.turn = 0;
    this.parts.run.addEventListener("click", () => this.start());
  }

  async start() {
    const { run, status, error, empty, result } = this.parts;
    const turn = (this.turn += 1);
    error.hidden = true;
    run.setAttribute("aria-busy", "true");
    result.setAttribute("aria-busy", "true");
    status.replaceChildren(el("span", { class: "spinner", "aria-hidden": "true" }), "Computing …");
    const begin = performance.now();
    try {
      const found = await this.work();
      if (turn !== this.turn) return;
      const sentence = await this.show(found);
      empty.hidden = true;
      result.hidden = false;
      status.textContent = `${Math.round(performance.now() - begin)} ms`;
      bringIntoView(result);
      announce(sentence);
    } catch (problem) {
      if (turn !== this.turn) return;
      if (!(problem instanceof ApiError) && !(problem instanceof Missing)) console.error(problem);
      status.textContent = "";
      this.fail(problem);
    } finally {
      if (turn === this.turn) {
        run.removeAttribute("aria-busy");
        result.removeAttribute("aria-busy");
      }
    }
  }

  fail(problem) {
    const { error, result, empty } = this.parts;
    const title = problem.status > 0 ? `The server answered ${problem.status}` : "Not done";
    error.replaceChildren(el("strong", { text: title }), el("span", { text: problem.message }));
    error.hidden = false;
    result.hidden = true;
    empty.hidden = true;
  }
}

// On a phone the result is below the inputs.
function bringIntoView(result) {
  if (result.getBoundingClientRect().top < innerHeight - 120) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  result.closest(".card").scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
}

/** The input of a request is not there yet. */
export class Missing extends Error {}
