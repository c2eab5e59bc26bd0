// Questions to the user, a menu, and short notices.

import { el } from "./dom.js";
import { t } from "./strings.js";

let last = Promise.resolve();

/**
 * Ask in a dialog; questions wait for each other.
 * @param {Object} question title, text, confirm (the button); with `value`, a line of text is asked for,
 *   of the given `type`
 * @returns {Promise<string|boolean|null>} the text, or true; null if cancelled
 */
export function ask(question) {
  last = last.then(() => open(question));
  return last;
}

function open({ title, text, confirm, value, type = "text", isDanger = false }) {
  return new Promise((resolve) => {
    let answer = null;
    const input = value === undefined ? null : el("input", { type, "aria-label": title, autocomplete: "off" });
    if (input) input.value = value;
    const dialog = el("dialog", { "aria-labelledby": "dialog-title", onclose: () => {
      dialog.remove();
      resolve(answer);
    } },
    el("form", { onsubmit: (event) => {
      event.preventDefault();
      if (input && !input.value.trim()) return;
      answer = input ? input.value.trim() : true;
      dialog.close();
    } },
    el("h2", { id: "dialog-title" }, title), text ? el("p", {}, text) : null, input,
    el("div.row", {},
      el("button.button", { type: "button", onclick: () => dialog.close() }, t("cancel")),
      el(isDanger ? "button.button.is-danger" : "button.button.is-first", { type: "submit" }, confirm))));
    document.body.append(dialog);
    dialog.showModal();
    input?.select();
  });
}

/** Tell something at the page's edge for some seconds. */
export function tell(text) {
  const box = document.getElementById("notices");
  const notice = el("p", {}, text);
  box.append(notice);
  setTimeout(() => notice.remove(), 6000);
}

/** Open a menu of [text, action] below a button. */
export function openMenu(button, entries) {
  document.getElementById("menu")?.remove();
  const close = () => {
    menu.remove();
    button.setAttribute("aria-expanded", "false");
    document.removeEventListener("pointerdown", outside, true);
  };
  const outside = (event) => {
    if (!menu.contains(event.target)) close();
  };
  const label = button.getAttribute("aria-label");
  const menu = el("div.menu", { id: "menu", role: "menu", "aria-label": label, onkeydown: (event) => {
    const items = [...menu.children];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
    else if (event.key === "Escape" || event.key === "Tab") {
      close();
      button.focus();
    } else return;
    event.preventDefault();
  } },
  ...entries.map(([text, action]) => el("button", { type: "button", role: "menuitem", onclick: () => {
    close();
    button.focus();
    action();
  } }, text)));
  document.body.append(menu);
  const at = button.getBoundingClientRect();
  const { width, height } = menu.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(at.left, window.innerWidth - width - 8))}px`;
  menu.style.top = `${at.bottom + height + 8 < window.innerHeight ? at.bottom + 4 : at.top - height - 4}px`;
  button.setAttribute("aria-expanded", "true");
  document.addEventListener("pointerdown", outside, true);
  menu.firstElementChild.focus();
}

/** Give the user a file. */
export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
