// A request as curl, Python and JavaScript, as a user would write it with files.

import { key } from "./api.js";
import { copyButton, el, newId } from "./dom.js";
import { Picture } from "./pictures.js";

const INDENT = "  ";
const JSON_HEADER = "Content-Type: application/json";

/** Write the request `POST path` with this body into `box`, in three languages. */
export function showRequest(box, path, body) {
  const url = `${location.origin}${path}`;
  const texts = { curl: curl(url, body), Python: python(url, body), JavaScript: javascript(url, body) };
  const before = box.querySelector('[aria-selected="true"]')?.textContent ?? "curl";
  const code = el("pre", { tabindex: "0", "aria-label": "The request as code" }, el("code"));
  const id = newId("request");
  code.id = id;
  code.setAttribute("role", "tabpanel");
  const buttons = Object.keys(texts).map((name) =>
    el("button", {
      type: "button",
      role: "tab",
      "aria-controls": id,
      text: name,
      click: () => choose(name, false),
      keydown: (event) => move(event, name),
    }),
  );

  function choose(name, focus) {
    for (const button of buttons) {
      const selected = button.textContent === name;
      button.setAttribute("aria-selected", String(selected));
      button.tabIndex = selected ? 0 : -1;
      if (selected && focus) button.focus();
    }
    code.firstChild.textContent = texts[name];
  }

  function move(event, name) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const names = Object.keys(texts);
    choose(names[(names.indexOf(name) + step + names.length) % names.length], true);
  }

  const list = el("div", { role: "tablist", "aria-label": "Language", class: "segments" }, ...buttons);
  const bar = el(
    "div",
    { class: "code-bar" },
    el("h3", { text: "This request" }),
    list,
    copyButton("Copy", () => code.textContent),
  );
  box.replaceChildren(bar, code);
  choose(before, false);
  box.hidden = false;
}

// Pictures are replaced by marks, around which each language puts its own way to read a file.
function marked(body, spaces) {
  const pictures = [];
  const text = JSON.stringify(
    body,
    function replace(name, value) {
      const original = this[name];
      if (!(original instanceof Picture)) return value;
      pictures.push(original);
      return `\u0000${pictures.length - 1}\u0000`;
    },
    spaces,
  );
  // Even parts are JSON, odd ones numbers of pictures, whose quotes belong to the JSON.
  return { parts: text.split(/\\u0000(\d+)\\u0000/), pictures };
}

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const authorized = () => key.get() !== "";

function curl(url, body) {
  const { parts, pictures } = marked(body);
  const header = authorized() ? ` \\\n${INDENT}-H "Authorization: Bearer $SIGLIP_KEY"` : "";
  const call = (data) => `curl -s ${shell(url)} -H ${shell(JSON_HEADER)}${header} \\\n${INDENT}${data}`;
  if (!pictures.length) return call(`-d ${shell(parts[0])}`);
  const pieces = parts.map((piece, index) =>
    index % 2
      ? `${INDENT}base64 < ${shell(pictures[Number(piece)].path)} | tr -d '\\n'`
      : `${INDENT}printf %s ${shell(piece)}`,
  );
  return `{\n${pieces.join("\n")}\n} | ${call("--data-binary @-")}`;
}

function filled(body, picture, spaces) {
  const { parts, pictures } = marked(body, spaces);
  return parts
    .map((piece, index) => {
      if (index % 2) return picture(JSON.stringify(pictures[Number(piece)].path));
      const begin = index > 0 ? 1 : 0;
      return piece.slice(begin, index < parts.length - 1 ? -1 : undefined);
    })
    .join("");
}

// JSON's words in Python. Texts in quotes are left as they are.
function pythonWords(text) {
  const words = { true: "True", false: "False", null: "None" };
  return text.replace(/"(?:[^"\\]|\\.)*"|\b(true|false|null)\b/g, (found, word) => (word ? words[word] : found));
}

function python(url, body) {
  const call = pythonWords(filled(body, (path) => `picture(${path})`, 4)).replaceAll("\n", "\n    ");
  const pictures = call.includes("picture(");
  const imports = [pictures ? "import base64" : "", authorized() ? "import os" : ""].filter(Boolean);
  const reader = `

def picture(path):
    return base64.b64encode(Path(path).read_bytes()).decode()

`;
  return `${imports.map((line) => `${line}\n`).join("")}${pictures ? "from pathlib import Path\n" : ""}${
    imports.length ? "\n" : ""
  }import requests
${pictures ? reader : ""}
answer = requests.post(
    ${JSON.stringify(url)},
    json=${call},${
      authorized() ? '\n    headers={"Authorization": f"Bearer {os.environ[\'SIGLIP_KEY\']}"},' : ""
    }
    timeout=60,
)
answer.raise_for_status()
print(answer.json())
`;
}

function javascript(url, body) {
  const call = filled(body, (path) => `await picture(${path})`, 2).replaceAll("\n", `\n${INDENT}`);
  const reader = `import { readFile } from "node:fs/promises";

const picture = async (path) => (await readFile(path)).toString("base64");

`;
  const authorization = authorized() ? `, Authorization: \`Bearer \${process.env.SIGLIP_KEY}\`` : "";
  return `${call.includes("await picture(") ? reader : ""}const answer = await fetch(${JSON.stringify(url)}, {
  method: "POST",
  headers: { "Content-Type": "application/json"${authorization} },
  body: JSON.stringify(${call}),
});
console.log(await answer.json());
`;
}
