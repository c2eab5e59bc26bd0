// The page: which conversation is open, which answers are being written, and what each button does.

import { promptOf, sentenceOf, write } from "./answering.js";
import { models as fetchModels, ServerError, setKeyQuestion, tokenize } from "./api.js";
import { ask, download, tell } from "./dialogs.js";
import { el, icon, throttled } from "./dom.js";
import { isAtEnd, isNarrow, listenToPanels, setSide, toEnd } from "./panels.js";
import { requested, showFields } from "./sampling.js";
import { readFiles, showList, titleOf } from "./sidebar.js";
import * as store from "./store.js";
import { number, sentence, setLanguage, t } from "./strings.js";
import { grow, sends, Thread } from "./thread.js";

const byId = (id) => document.getElementById(id);
const choices = store.loadChoices();
const writing = new Map(); // id of a conversation -> AbortController of its answer
let conversations = store.loadConversations();
let current = null;
let models = [];
let modelProblem = "";

const thread = new Thread(byId("thread"), {
  regenerate: () => {
    if (writing.has(current.id)) return;
    if (current.messages.at(-1)?.role === "assistant") current.messages.pop();
    answer(current);
  },
  edit: (index, text) => {
    writing.get(current.id)?.abort();
    current.messages.splice(index);
    current.messages.push({ role: "user", content: text });
    answer(current);
  },
  prompt: async (index) => {
    const message = current.messages[index];
    const model = message.model ?? modelOf(current)?.id;
    return message.promptTokens ?? (await tokenize(promptOf(current, index, model, message.forgotten))).prompt;
  },
});

const modelOf = (conversation) => models.find((one) => one.id === conversation.model) ?? models[0] ?? null;

async function answer(conversation) {
  const { messages } = conversation;
  const model = modelOf(conversation);
  const drawn = requested(conversation.sampling, model?.recommended);
  const message = { role: "assistant", content: "", tokens: [], model: model?.id };
  const controller = new AbortController();
  messages.push(message);
  writing.set(conversation.id, controller);
  conversation.changed = Date.now();
  keep(conversation);
  if (conversation === current) showConversation(true);
  byId("spoken").textContent = t("writing");
  const redraw = throttled(() => {
    if (conversation !== current || writing.get(conversation.id) !== controller) return;
    const stays = isAtEnd();
    thread.update(messages.indexOf(message), true);
    if (stays) toEnd();
  });
  try {
    await write(conversation, message, drawn, controller.signal, redraw);
  } catch (error) {
    if (error.name === "AbortError") message.finish = "cancelled";
    else message.error = error instanceof ServerError ? sentenceOf(error) : t("lost");
  }
  // An edit may have begun the next answer meanwhile.
  if (writing.get(conversation.id) === controller) writing.delete(conversation.id);
  if (!conversations.includes(conversation)) return;
  if (messages.includes(message)) keep(conversation);
  if (conversation === current && !writing.has(conversation.id)) {
    const stays = isAtEnd();
    const shown = messages.indexOf(message);
    if (shown >= 0) thread.update(shown, false);
    if (stays) toEnd();
    showComposer();
    byId("spoken").textContent = message.error ?? t("done", { text: message.content.slice(0, 1000) });
  }
  refreshModels(false);
}

function send() {
  const field = byId("message");
  const isText = current.kind === "text";
  const text = isText ? field.value : field.value.trim();
  if (writing.has(current.id) || (!text.trim() && !(isText && current.messages.length))) return;
  if (text) current.messages.push({ role: "user", content: text });
  field.value = "";
  grow(field);
  answer(current);
}

function keep(conversation) {
  if (!conversations.includes(conversation)) conversations.push(conversation);
  conversations.sort((one, other) => other.changed - one.changed);
  const { id } = conversation;
  const problem = store.saveConversation(conversation);
  if (problem) tell(t(problem));
  if (conversation.id !== id) fork(conversation, id);
  drawList();
}

// Another tab has written the same conversation: both stay, this tab's under another id.
function fork(conversation, id) {
  if (writing.has(id)) writing.set(conversation.id, writing.get(id));
  writing.delete(id);
  conversations.push(...store.loadConversations().filter((one) => one.id === id));
  if (conversation === current) choices.open = conversation.id;
  store.saveChoices(choices);
}

// What other tabs have saved; conversations that are being written here stay as they are here.
function reload() {
  const ours = conversations.filter((one) => writing.has(one.id));
  const theirs = store.loadConversations().filter((one) => !writing.has(one.id));
  conversations = [...ours, ...theirs].sort((one, other) => other.changed - one.changed);
  const same = theirs.find((one) => one.id === current.id);
  if (same && same.revision !== current.revision) open(same);
  else {
    if (same) conversations[conversations.indexOf(same)] = current;
    drawList();
  }
}

function drawList() {
  showList(conversations, current?.id, {
    open: (id) => {
      open(conversations.find((one) => one.id === id));
      setSide(false);
    },
    save: keep,
    remove: (id) => {
      writing.get(id)?.abort();
      store.deleteConversation(id);
      conversations = conversations.filter((one) => one.id !== id);
      if (current.id === id) startNew();
      else drawList();
    },
  });
}

function open(conversation) {
  current = conversation;
  choices.open = conversation.messages.length ? conversation.id : null;
  store.saveChoices(choices);
  drawList();
  showModel();
  showSettings();
  showConversation(writing.has(conversation.id));
  toEnd();
}

function startNew() {
  const before = current ?? conversations[0];
  const model = choices.model ?? null;
  const kind = models.length && !(models.find((one) => one.id === model) ?? models[0]).chat ? "text" : "chat";
  open(store.newConversation({ kind, model, sampling: { ...before?.sampling } }));
}

function showConversation(isWriting) {
  thread.isShowingTokens = choices.isShowingTokens ?? false;
  thread.show(current, isWriting);
  showComposer();
  const isNew = !current.messages.length;
  byId("start").hidden = !isNew;
  document.title = isNew ? "zero2all" : `${titleOf(current)} · zero2all`;
  if (current.messages.length === 2 && isWriting) choices.open = current.id;
  store.saveChoices(choices);
  if (isWriting) toEnd();
}

function showComposer() {
  const isWriting = writing.has(current.id);
  const isText = current.kind === "text";
  byId("send").hidden = isWriting;
  byId("stop").hidden = !isWriting;
  const isBegun = current.messages.length > 0;
  byId("message").placeholder = t(!isText ? "messageHint" : isBegun ? "textMore" : "textHint");
  const last = current.messages.findLast((message) => message.total)?.total;
  const all = modelOf(current)?.max_model_len;
  byId("used").textContent = last && all ? t("used", { count: number(last), all: number(all) }) : "";
}

async function refreshModels(mayAsk) {
  try {
    models = await fetchModels(mayAsk);
    modelProblem = models.length ? "" : t("noModels");
  } catch (error) {
    modelProblem = error.message;
  }
  // An empty conversation takes the form that the model can do.
  if (!current.messages.length && modelOf(current)?.chat === false) current.kind = "text";
  showModel();
  showSettings();
  showComposer();
}

function showModel() {
  const select = byId("model");
  const model = modelOf(current);
  const stepped = (one) => (one.step === null ? one.id : t("modelStep", { name: one.id, step: number(one.step) }));
  const label = (one) => (one.parent ? `↳ ${stepped(one)}` : stepped(one));
  const options = models.map((one) => `${one.id}\n${label(one)}`).join("\n");
  if (select.dataset.options !== options) {
    select.replaceChildren(...models.map((one) => el("option", { value: one.id }, label(one))));
    select.dataset.options = options;
  }
  select.hidden = !models.length;
  if (model) select.value = model.id;
  const isText = current.kind === "text";
  byId("start").querySelector("h1").textContent = t(isText ? "greetingText" : "greeting");
  byId("about").textContent =
    model ? t("context", { model: model.id, count: number(model.max_model_len) }) : modelProblem;
  const notes = [...(model && !model.chat ? [t("textOnly")] : []), ...(model?.notes ?? []).map(sentence)];
  byId("notes").replaceChildren(...notes.map((note) => el("li", {}, note)));
  byId("mode").hidden = !model?.chat;
  for (const button of byId("mode").children) {
    button.setAttribute("aria-pressed", String(button.value === current.kind));
  }
}

let shownFields = "";

function showSettings() {
  const isText = current.kind === "text";
  const recommended = modelOf(current)?.recommended ?? {};
  byId("system-section").hidden = isText;
  if (byId("system") !== document.activeElement) byId("system").value = current.system;
  // Fields in which the user writes stay.
  const shown = JSON.stringify([current.id, isText, recommended, document.documentElement.lang]);
  if (shown === shownFields) return;
  shownFields = shown;
  showFields(byId("sampling"), current.sampling, recommended, isText, keepSettings);
}

function keepSettings() {
  if (current.messages.length) keep(current);
}

function setChoice(name, value) {
  choices[name] = value || undefined;
  store.saveChoices(choices);
}

function setTheme() {
  document.documentElement.dataset.theme = choices.theme ?? "";
  byId("theme").value = choices.theme ?? "";
}

function drawTexts() {
  setLanguage(choices.language ?? null);
  byId("language").value = choices.language ?? "";
}

function listen() {
  const on = (id, event, work) => byId(id).addEventListener(event, work);
  const field = byId("message");
  on("composer", "submit", (event) => {
    event.preventDefault();
    send();
  });
  on("message", "keydown", (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    send();
  });
  on("message", "input", () => grow(field));
  on("stop", "click", () => {
    writing.get(current.id)?.abort();
    field.focus();
  });
  on("new", "click", () => {
    startNew();
    setSide(false);
    field.focus();
  });
  on("tokens", "click", () => {
    setChoice("isShowingTokens", !choices.isShowingTokens);
    byId("tokens").setAttribute("aria-pressed", String(Boolean(choices.isShowingTokens)));
    showConversation(writing.has(current.id));
  });
  on("model", "change", () => {
    current.model = byId("model").value;
    setChoice("model", current.model);
    if (!current.messages.length) current.kind = modelOf(current).chat ? "chat" : "text";
    keepSettings();
    showModel();
    showSettings();
    showComposer();
  });
  on("mode", "click", (event) => {
    const kind = event.target.closest("button")?.value;
    if (!kind) return;
    current.kind = kind;
    showModel();
    showSettings();
    showComposer();
  });
  on("system", "input", () => {
    current.system = byId("system").value;
    keepSettings();
  });
  on("reset", "click", () => {
    for (const name of Object.keys(current.sampling)) delete current.sampling[name];
    shownFields = "";
    showSettings();
    keepSettings();
  });
  on("theme", "change", () => {
    setChoice("theme", byId("theme").value);
    setTheme();
  });
  on("language", "change", () => {
    setChoice("language", byId("language").value);
    drawTexts();
    byId("model").dataset.options = "";
    open(current);
  });
  on("export", "click", () => download("conversations.json", store.exportJson(conversations), "application/json"));
  on("import", "click", () => byId("file").click());
  on("file", "change", async () => {
    const found = await readFiles(byId("file").files);
    byId("file").value = "";
    found.forEach(keep);
    if (found.length) open(found[0]);
  });
  window.addEventListener("storage", (event) => {
    if (store.concernsConversations(event)) reload();
  });
  document.addEventListener("visibilitychange", () => document.hidden || refreshModels(false));
  // What has arrived of an answer outlives the page.
  window.addEventListener("pagehide", () => {
    for (const conversation of conversations) if (writing.has(conversation.id)) store.saveConversation(conversation);
  });
}

function start() {
  for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
  drawTexts();
  setTheme();
  setKeyQuestion((isRefused) =>
    ask({
      title: t("keyTitle"), text: t(isRefused ? "keyWrong" : "keyText"), confirm: t("ok"), value: "", type: "password",
    }));
  byId("tokens").setAttribute("aria-pressed", String(Boolean(choices.isShowingTokens)));
  listen();
  listenToPanels();
  const last = conversations.find((one) => one.id === choices.open);
  if (last) open(last);
  else startNew();
  refreshModels(true);
  if (!isNarrow()) byId("message").focus();
}

start();
