// Small helpers to build and find elements.

/**
 * An element. Attributes that are null or false are left out, and functions become listeners.
 * Children are nodes or texts; nothing is parsed as HTML.
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false || value === undefined) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** The element of this id. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return found;
}

/** The part of a component inside `root` that is marked data-part="name". */
export function part(root, name) {
  const found = root.querySelector(`[data-part="${name}"]`);
  if (!found) throw new Error(`no part ${name}`);
  return found;
}

/** A copy of the content of <template id="id">. */
export function fromTemplate(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

/** A new id for elements that refer to each other. */
export const newId = (() => {
  let count = 0;
  return (prefix) => `${prefix}-${(count += 1)}`;
})();

/** The lines of a text field, without empty ones. */
export function lines(field) {
  return field.value
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
}

/** The value of the checked radio button of this name. */
export function chosen(root, name) {
  return root.querySelector(`input[name="${name}"]:checked`).value;
}

/** Copy a text, also where the page is no secure context. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

/** A button that copies the text that `text` returns, and says so. */
export function copyButton(label, text) {
  const button = el("button", { type: "button", class: "quiet small", text: label });
  button.addEventListener("click", async () => {
    const done = await copyText(text());
    announce(done ? "Copied" : "The browser does not allow copying");
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = label), 1600);
  });
  return button;
}

/** Hand a file to the user. */
export function download(name, data, type) {
  const url = URL.createObjectURL(new Blob([data], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Say something to users of screen readers. */
export function announce(text) {
  byId("announcer").textContent = text;
}
