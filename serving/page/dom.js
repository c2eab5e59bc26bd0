// Making elements. Text of a model or a user goes in as text nodes only: nothing on this page is parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

/**
 * New element.
 * @param {string} name tag and classes, like "button.icon"
 * @param {Object} [attributes] functions are listeners ("onclick"), true is an empty attribute; null, undefined and
 *   false are left out
 * @param {...(Node|string|null)} children strings become text nodes
 */
export function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Outlines on a 24 x 24 grid.
const OUTLINES = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  tokens: "M4 6h6v5H4zM13 6h7v5h-7zM4 14h8v5H4zM15 14h5v5h-5z",
  prompt: "M8 5H5v14h3M16 5h3v14h-3M9 12h6",
  settings: "M4 7h9M17 7h3M15 5v4M4 17h3M11 17h9M9 15v4",
  down: "M12 5v14M6 13l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
};

/** Icon that says nothing to a screen reader: what it is on has a label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" })) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", OUTLINES[name]);
  svg.append(path);
  return svg;
}

/** Button that shows an icon and is called `label`. */
export function iconButton(name, label, onclick, attributes = {}) {
  const all = { type: "button", "aria-label": label, title: label, "data-icon": name, onclick, ...attributes };
  return el("button.icon-button", all, icon(name));
}

/** Text on the clipboard. Browsers give pages that did not come over https or from this machine no clipboard. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = el("textarea", { readonly: true, class: "visually-hidden" });
    field.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const isDone = document.execCommand("copy");
    field.remove();
    return isDone;
  }
}

/**
 * Function that calls `work` at most once a frame, and for a quarter of the time: the page must stay responsive under
 * answers of any length. A hidden tab draws no frames, and needs none.
 */
export function throttled(work) {
  let isWaiting = false;
  let idleUntil = 0;
  const call = () => {
    isWaiting = false;
    const began = performance.now();
    work();
    idleUntil = performance.now() + 3 * (performance.now() - began);
  };
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    const pause = idleUntil - performance.now();
    if (pause > 16) setTimeout(() => requestAnimationFrame(call), pause);
    else requestAnimationFrame(call);
  };
}
