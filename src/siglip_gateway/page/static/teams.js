// The tab Teams: which players belong together?

import { ask } from "./api.js";
import { showRequest } from "./code.js";
import { Crops } from "./crops.js";
import { chosen, download, el, part } from "./dom.js";
import { FrameBoxes } from "./frame.js";
import { readSample } from "./pictures.js";
import { Missing, Run } from "./run.js";

const MEANINGS = {
  OK: "The teams are well apart.",
  LOW_SUPPORT: "Fewer than 30 crops: more of them make the teams surer.",
  LOW_SEPARATION: "The teams are hardly apart. There may be only one, or the model cannot tell them apart.",
  ANCHOR_CONFLICT: "At least half of a team's anchors are not in its group.",
  DEGENERATE: "All crops look the same, so there are no teams.",
};
const SAMPLE_FOLDER = "src/siglip_gateway/page/static/samples";

/** Set the panel up. */
export function setUpTeams(panel) {
  const kept = part(panel, "keep");
  const view = new View(panel);
  let state = null;
  const crops = new Crops(part(panel, "as-crops"), () => crops.pictures.length && run.start());
  const frame = new FrameBoxes(part(panel, "as-frame"), part(panel, "stage"), () => {});

  function ofCrops() {
    if (!crops.pictures.length) throw new Missing("Choose the crops first.");
    const { tracks } = crops;
    return { crops: crops.pictures, ...(tracks ? { track_ids: tracks } : {}) };
  }

  function ofFrame() {
    const { picture } = frame.subject;
    if (!picture) throw new Missing("Choose a frame first.");
    let boxes;
    try {
      ({ boxes } = frame);
    } catch (problem) {
      throw new Missing(problem.message);
    }
    if (!boxes.length) throw new Missing("Draw a box around each player, or write the boxes as JSON.");
    const { tracks } = frame;
    return { image: picture, boxes, ...(tracks ? { track_ids: tracks } : {}) };
  }

  const isFrame = () => chosen(panel, "teams-kind") === "frame";
  const run = new Run(
    panel,
    async () => {
      const body = isFrame() ? ofFrame() : ofCrops();
      if (kept.checked && state) {
        body.state = state;
        delete body.track_ids;
      } else {
        body.k = part(panel, "count").valueAsNumber || 2;
      }
      showRequest(part(panel, "request"), "/teams", body);
      return { body, answer: await ask("/teams", body) };
    },
    async ({ body, answer }) => {
      state = answer.state || state;
      part(panel, "keep-field").hidden = !state;
      part(panel, "state").hidden = !answer.state;
      const faces = body.crops ? body.crops.map(ofPicture) : await cutOut(body.image, body.boxes);
      return view.show(answer, faces, body, (names) => body.image && frame.paint(names));
    },
  );

  function kindChanged() {
    part(panel, "as-crops").hidden = isFrame();
    part(panel, "as-frame").hidden = !isFrame();
    part(panel, "stage").hidden = !isFrame() || !frame.subject.picture;
  }
  for (const option of panel.querySelectorAll('[name="teams-kind"]')) option.addEventListener("change", kindChanged);
  part(panel, "sample").addEventListener("click", async () => {
    const boxes = await (await fetch("/page/samples/match.json")).json();
    panel.querySelector('[name="teams-kind"][value="frame"]').checked = true;
    frame.set(await readSample("match.jpg", SAMPLE_FOLDER), boxes);
    kindChanged();
    run.start();
  });
  part(panel, "state").addEventListener("click", () => {
    download("teams.npz", Uint8Array.from(atob(state), (letter) => letter.charCodeAt(0)), "application/octet-stream");
  });
  kindChanged();
}

// The result: players in groups. Outliers are a group that follows the slider.
class View {
  constructor(panel) {
    this.panel = panel;
    this.limit = part(panel, "outliers");
    this.limit.addEventListener("input", () => this.group());
  }

  show(answer, faces, body, painted) {
    this.players = faces.map((face, index) => ({
      face,
      label: answer.labels[index],
      // Null where a number is not finite.
      margin: answer.margin[index] ?? 0,
      outlier: answer.outlier_score[index] ?? Infinity,
      track: body.track_ids?.[index] ?? -1,
      name: body.crops?.[index].name ?? `box ${index}`,
    }));
    this.painted = painted;
    part(this.panel, "teams-note").textContent = answer.note ? `${answer.model}: ${answer.note}` : "";
    const words = answer.status ?? [];
    part(this.panel, "words").replaceChildren(
      ...words.map((word) =>
        el("p", { class: word === "OK" ? "word" : "word warn" }, el("strong", { text: word }), ` ${MEANINGS[word] ?? ""}`),
      ),
    );
    return this.group();
  }

  group() {
    const limit = Number(this.limit.value);
    part(this.panel, "outliers-value").textContent = `above ${limit.toFixed(1)}`;
    const groups = new Map();
    const names = this.players.map((player) => {
      const name = player.label < 0 || player.outlier > limit ? "outlier" : `team-${player.label}`;
      groups.set(name, [...(groups.get(name) ?? []), player]);
      return name;
    });
    const last = (name) => Number(name === "outlier");
    const sorted = [...groups].sort(([first], [second]) => last(first) - last(second) || first.localeCompare(second));
    part(this.panel, "groups").replaceChildren(...sorted.map(([name, players]) => groupCard(name, players)));
    this.painted(names);
    return sorted.map(([name, players]) => `${titleOf(name)}: ${players.length}`).join(", ");
  }
}

const titleOf = (name) => (name === "outlier" ? "Outliers" : `Team ${Number(name.slice(5)) + 1}`);

function groupCard(name, players) {
  players.sort((first, second) => second.margin - first.margin);
  return el(
    "section",
    { class: `group ${name}`, "aria-label": titleOf(name) },
    el("h3", { text: titleOf(name) }, el("span", { class: "count", text: String(players.length) })),
    el("ul", { class: "players" }, ...players.map(playerItem)),
  );
}

function playerItem({ face, margin, outlier, track, name }) {
  const fill = el("span", { class: "fill" });
  fill.style.inlineSize = `${Math.max(0, Math.min(1, margin)) * 100}%`;
  const text = `${name}, ${track >= 0 ? `track ${track}, ` : ""}margin ${margin.toFixed(2)}, outlier score ${outlier.toFixed(1)}`;
  face.classList.add("face");
  return el(
    "li",
    { title: text },
    face,
    track >= 0 ? el("span", { class: "badge", "aria-hidden": "true", text: String(track) }) : null,
    el("span", { class: "track", "aria-hidden": "true" }, fill),
    el("span", { class: "visually-hidden", text }),
  );
}

const ofPicture = (picture) => el("img", { src: picture.url, alt: "" });

// The part of a picture in each box, as canvases.
async function cutOut(picture, boxes) {
  const image = new Image();
  image.src = picture.url;
  await image.decode();
  return boxes.map(([x0, y0, x1, y1]) => {
    const canvas = el("canvas", { "aria-hidden": "true" });
    canvas.width = Math.max(1, Math.round(x1 - x0));
    canvas.height = Math.max(1, Math.round(y1 - y0));
    canvas.getContext("2d").drawImage(image, -Math.round(x0), -Math.round(y0));
    return canvas;
  });
}
