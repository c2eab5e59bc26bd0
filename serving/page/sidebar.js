// The list of conversations, and what can be done with one.

import { ask, download, openMenu, tell } from "./dialogs.js";
import { el, iconButton } from "./dom.js";
import { exportJson, exportMarkdown, importJson } from "./store.js";
import { t } from "./strings.js";

/** Title of a conversation: its name, or how it begins. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const begin = (conversation.messages[0]?.content ?? "").trim().replace(/\s+/g, " ");
  const characters = [...begin];
  return characters.length > 48 ? `${characters.slice(0, 47).join("")}…` : begin || t("untitled");
}

/**
 * Draw the list.
 * @param {Object[]} conversations
 * @param {string} currentId
 * @param {Object} actions open(id), save(conversation), remove(id)
 */
export function showList(conversations, currentId, actions) {
  const focused = document.activeElement?.closest?.("#list li")?.dataset.id;
  const list = document.getElementById("list");
  list.replaceChildren(...conversations.map((conversation) => {
    const title = titleOf(conversation);
    const more = iconButton("more", t("more", { title }), () => openMenu(more, entries(conversation, actions)),
      { "aria-haspopup": "menu", "aria-expanded": "false" });
    return el("li", { "data-id": conversation.id },
      el("button.title", {
        type: "button", title, dir: "auto", "aria-current": conversation.id === currentId ? "true" : null,
        onclick: () => actions.open(conversation.id),
      }, title), more);
  }));
  if (focused) [...list.children].find((item) => item.dataset.id === focused)?.querySelector(".title").focus();
}

function entries(conversation, actions) {
  const title = titleOf(conversation);
  const file = title.replace(/[^\p{L}\p{N}._-]+/gu, "-").replace(/^[-.]+|-+$/g, "").slice(0, 60) || "conversation";
  return [
    [t("rename"), async () => {
      const name = await ask({ title: t("renameTitle"), value: title, confirm: t("save") });
      if (name === null) return;
      conversation.title = name;
      conversation.isNamed = true;
      actions.save(conversation);
    }],
    [t("exportMarkdown"), () => {
      const names = { user: t("you"), assistant: t("assistant"), system: t("system") };
      download(`${file}.md`, exportMarkdown({ ...conversation, title }, names), "text/markdown");
    }],
    [t("exportJson"), () => download(`${file}.json`, exportJson([conversation]), "application/json")],
    [t("delete"), async () => {
      const words = { title: t("deleteTitle", { title }), text: t("deleteText"), confirm: t("delete") };
      if (await ask({ ...words, isDanger: true })) actions.remove(conversation.id);
    }],
  ];
}

/** Conversations of files that the user chose; tells what came of each. */
export async function readFiles(files) {
  const found = [];
  for (const file of files) {
    const conversations = importJson(await file.text());
    if (conversations) found.push(...conversations);
    else tell(t("notImported", { file: file.name }));
  }
  if (found.length) tell(t("imported", { count: found.length }));
  return found;
}
