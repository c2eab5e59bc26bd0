// Conversations and choices in the browser's localStorage: one entry a conversation, so that two tabs do not write over
// each other's. A conversation is plain data:
//
//     {revision, id, title, isNamed, created, changed, kind: "chat" | "text", model, system, sampling: {name: value},
//      messages: [{role: "user" | "assistant", content, ...what api.js adds to an answer}]}

const CONVERSATION = "zero2all.conversation.";
const CHOICES = "zero2all.choices";
const FORMAT = "zero2all conversations";

const newId = () => crypto.randomUUID?.() ?? String(Date.now()) + Math.random();

/** New conversation, saved with its first message. Each save gives it another `revision`. */
export function newConversation(values) {
  const now = Date.now();
  return {
    revision: null, id: newId(), title: "", isNamed: false, created: now, changed: now,
    kind: "chat", model: null, system: "", sampling: {}, messages: [], ...values,
  };
}

/** All conversations, the newest first. Entries that are none are left alone. */
export function loadConversations() {
  const found = [];
  for (const key of storedKeys()) {
    const conversation = checked(parsed(localStorage.getItem(key)));
    if (conversation) found.push({ ...conversation, id: key.slice(CONVERSATION.length) });
  }
  return found.sort((one, other) => other.changed - one.changed);
}

function storedKeys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(CONVERSATION));
  } catch {
    return [];
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/**
 * Save a conversation. If another tab has saved it since this one read it, it becomes one of its own, with another id.
 * @returns {string|null} null if all is well, else the key of a sentence: "lean", "full", "unsaved" or "forked"
 */
export function saveConversation(conversation) {
  const found = savedRevision(conversation.id);
  const isForked = found !== null && found !== conversation.revision;
  if (isForked) conversation.id = newId();
  conversation.revision = newId();
  return write(conversation) ?? (isForked ? "forked" : null);
}

// The revision stands first, so that a long conversation need not be parsed.
function savedRevision(id) {
  try {
    return /^\{"revision":"([^"]*)"/.exec(localStorage.getItem(CONVERSATION + id)?.slice(0, 99) ?? "")?.[1] ?? null;
  } catch {
    return null;
  }
}

function write(conversation) {
  const attempt = (replacer) => {
    try {
      localStorage.setItem(CONVERSATION + conversation.id, JSON.stringify(conversation, replacer));
      return null;
    } catch (error) {
      return error.name === "QuotaExceededError" ? "full" : "unsaved";
    }
  };
  const problem = attempt(lasting);
  if (problem !== "full") return problem;
  if (dropTokens(conversation.id) && attempt(lasting) === null) return "lean";
  return attempt((key, value) => (key === "tokens" ? undefined : lasting(key, value))) === null ? "lean" : "full";
}

// The prompt grows with each turn, and the server can tell it again.
const lasting = (key, value) => (key === "promptTokens" ? undefined : value);

// Probabilities are the largest part of what is kept, and the first that one can do without.
function dropTokens(except) {
  let isDropped = false;
  for (const conversation of loadConversations()) {
    if (conversation.id === except || !conversation.messages.some((message) => message.tokens?.length)) continue;
    for (const message of conversation.messages) delete message.tokens;
    localStorage.setItem(CONVERSATION + conversation.id, JSON.stringify(conversation));
    isDropped = true;
  }
  return isDropped;
}

export function deleteConversation(id) {
  try {
    localStorage.removeItem(CONVERSATION + id);
  } catch {
    // A browser that keeps nothing has nothing to delete.
  }
}

/** Whether a change in another tab concerns conversations. */
export function concernsConversations(event) {
  return event.key === null || event.key.startsWith(CONVERSATION);
}

/** What the user has chosen for the page: language, theme, model, isShowingTokens. */
export function loadChoices() {
  try {
    return parsed(localStorage.getItem(CHOICES)) ?? {};
  } catch {
    return {};
  }
}

export function saveChoices(choices) {
  try {
    localStorage.setItem(CHOICES, JSON.stringify(choices));
  } catch {
    // The page works without; a conversation that cannot be saved says so.
  }
}

export function exportJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, lasting, 1);
}

/** Conversations of an export, with new ids; null if it is none. */
export function importJson(text) {
  const file = parsed(text);
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) return null;
  return file.conversations.map(checked).filter(Boolean).map((one) => ({ ...one, id: newId() }));
}

/** Conversation as Markdown. `names` gives what the roles are called. */
export function exportMarkdown(conversation, names) {
  const { title, kind, system, messages } = conversation;
  const model = messages.findLast((message) => message.model)?.model;
  if (kind === "text") return messages.map((message) => message.content).join("");
  const parts = [`# ${title}`, ...(model ? [`*${model}*`] : []), ...(system ? [`## ${names.system}`, system] : [])];
  for (const { role, content } of messages) parts.push(`## ${names[role]}`, content);
  return `${parts.join("\n\n")}\n`;
}

// A file may come from anywhere: only fields of the right kinds enter.
function checked(value) {
  if (typeof value !== "object" || value === null || !Array.isArray(value.messages)) return null;
  const take = (from, name, kind, usual) => (typeof from[name] === kind ? from[name] : usual);
  const finite = (from, name) => (Number.isFinite(from[name]) ? from[name] : undefined);
  const messages = value.messages
    .filter((one) => one && ["user", "assistant"].includes(one.role) && typeof one.content === "string")
    .map((one) => {
      const message = { role: one.role, content: one.content };
      if (one.role === "user") return message;
      const figures = ["count", "total", "cached", "seconds", "rate", "forgotten"];
      for (const name of figures) message[name] = finite(one, name);
      for (const name of ["finish", "model", "error"]) message[name] = take(one, name, "string", undefined);
      const tokens = Array.isArray(one.tokens) ? one.tokens.filter(isToken) : [];
      return { ...message, tokens };
    });
  const isPlain = ([, one]) => ["number", "string"].includes(typeof one);
  const sampling = Object.entries(Object(value.sampling)).filter(isPlain);
  return newConversation({
    title: take(value, "title", "string", ""), isNamed: value.isNamed === true,
    created: finite(value, "created") ?? Date.now(), changed: finite(value, "changed") ?? Date.now(),
    revision: take(value, "revision", "string", null),
    kind: value.kind === "text" ? "text" : "chat", model: take(value, "model", "string", null),
    system: take(value, "system", "string", ""), sampling: Object.fromEntries(sampling), messages,
  });
}

const isToken = (token) => isScore(token) && Array.isArray(token[3]) && token[3].every(isScore);
const isScore = (one) =>
  Array.isArray(one) && typeof one[0] === "string" &&
  [one[1], one[2]].every((value) => value === null || Number.isFinite(value));
