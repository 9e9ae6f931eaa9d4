// The page: tabs, the checkpoint, the key and the theme.

import { ApiError, ask, key } from "./api.js";
import { setUpClassify } from "./classify.js";
import { announce, byId } from "./dom.js";
import { setUpEmbed } from "./embed.js";
import { setUpHeatmap } from "./heatmap.js";
import { Subject } from "./pictures.js";
import { setUpSearch } from "./search.js";
import { setUpTabs } from "./tabs.js";
import { setUpTeams } from "./teams.js";

const PATIENCE = 500; // milliseconds that the panels wait for the server's note
const AGAIN = 3000; // milliseconds until a server that does not compute is asked again

const subject = new Subject();

setUpClassify(byId("classify"), subject);
setUpHeatmap(byId("heatmap"), subject);
setUpTeams(byId("teams"));
const lookForCollection = setUpSearch(byId("search"));
setUpEmbed(byId("embed"), subject);
setUpTabs(byId("tabs"), (name) => name === "search" && lookForCollection());
setUpTheme();
setUpKey();
Promise.race([showCheckpoint(), new Promise((resolve) => setTimeout(resolve, PATIENCE))]).then(() => {
  byId("content").dataset.ready = "";
});

async function showCheckpoint() {
  const chip = byId("checkpoint");
  try {
    const health = await ask("/health");
    byId("checkpoint-name").textContent = health.model;
    byId("checkpoint-facts").textContent = `${health.dimensions} dimensions`;
    await showModel(health);
    chip.dataset.state = "ready";
  } catch (problem) {
    chip.dataset.state = "down";
    byId("checkpoint-name").textContent = "The server does not compute";
    byId("checkpoint-facts").textContent = problem.message;
    setTimeout(showCheckpoint, AGAIN);
  }
}

// The list of models needs a key where keys are set, so it tells whether the page has a right one.
async function showModel(health) {
  try {
    const { data } = await ask("/v1/models");
    byId("key-button").hidden = !key.get();
    showNote(data[0].note);
  } catch (problem) {
    showNote(health.note);
    if (!(problem instanceof ApiError) || problem.status !== 401) throw problem;
  }
}

function showNote(note) {
  byId("note").hidden = !note;
  byId("note-text").textContent = note ? `This checkpoint ${note}` : "";
}

function setUpTheme() {
  const button = byId("theme-button");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const current = () => document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
  const update = () => {
    button.setAttribute("aria-label", current() === "dark" ? "Switch to light colours" : "Switch to dark colours");
  };
  button.addEventListener("click", () => {
    const next = current() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("theme", next);
    } catch {
      // Storage is off: the choice holds until the page is left.
    }
    update();
    document.dispatchEvent(new CustomEvent("theme-changed"));
  });
  system.addEventListener("change", update);
  update();
}

function setUpKey() {
  const dialog = byId("key-dialog");
  const field = byId("key-field");
  const open = () => {
    byId("key-button").hidden = false;
    field.value = key.get();
    if (!dialog.open) dialog.showModal();
  };
  document.addEventListener("key-needed", () => {
    byId("key-problem").textContent = key.get() ? "The server refuses this key." : "This server needs a key.";
    open();
  });
  byId("key-button").addEventListener("click", () => {
    byId("key-problem").textContent = "";
    open();
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(field.value.trim());
    dialog.close();
    announce("The key is kept until this browser tab is closed");
    showCheckpoint();
    if (!byId("search").hidden) lookForCollection();
  });
  byId("key-cancel").addEventListener("click", () => dialog.close());
}
