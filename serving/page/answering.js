// What is asked of the server for an answer: all that was said before, or as much of it as the model has room for.

import { generate, tokenize, USUAL_CONTINUATION } from "./api.js";
import { sentence, t } from "./strings.js";

const TOO_LONG = "context_length_exceeded";

/** What a request says before its answer number `index`; of a conversation, without messages before number `from`. */
export function promptOf({ kind, messages, system }, index, model, from = 0) {
  const before = messages.slice(from, index);
  const named = model ? { model } : {};
  if (kind === "text") return { ...named, prompt: before.map((message) => message.content).join("") };
  const said = before.map(({ role, content }) => ({ role, content }));
  return { ...named, messages: system.trim() ? [{ role: "system", content: system }, ...said] : said };
}

/**
 * Fill `message`, the last one of the conversation, as the model answers.
 * @param {Object} drawn the request's fields for sampling
 */
export async function write(conversation, message, drawn, signal, onChange) {
  const { kind, messages } = conversation;
  const last = messages.findLast((one) => one.forgotten && one.model === message.model);
  message.forgotten = last?.forgotten;
  const request = { ...promptOf(conversation, messages.indexOf(message), message.model, last?.forgotten), ...drawn };
  if (kind === "text") await measurePrompt(request, message, signal);
  try {
    await generate(request, message, signal, onChange);
  } catch (error) {
    const said = error.code === TOO_LONG && kind === "chat" && (await shortened(conversation, message, drawn, signal));
    if (!said) throw error;
    await generate({ ...request, ...said }, message, signal, onChange);
  }
}

// A conversation that is longer than the model's context goes on without its oldest exchanges, as in the terminal. Null
// if what was said last is too long by itself.
async function shortened(conversation, message, { max_tokens: wanted }, signal) {
  const place = conversation.messages.indexOf(message);
  for (let from = (message.forgotten ?? 0) + 1; from < place; from += 1) {
    if (conversation.messages[from].role !== "user") continue;
    const said = promptOf(conversation, place, message.model, from);
    const { count, max_model_len: room } = await tokenize(said, signal);
    if (count + (wanted ?? Math.min(USUAL_CONTINUATION, room >> 2)) > room) continue;
    message.forgotten = from;
    return said;
  }
  return null;
}

// A continuation asks for a number of tokens; it must not be more than there is room for.
async function measurePrompt(request, message, signal) {
  const { model, prompt } = request;
  const { count, max_model_len: room, prompt: tokens } = await tokenize({ ...(model && { model }), prompt }, signal);
  message.promptTokens = tokens;
  request.max_tokens ??= Math.max(1, Math.min(USUAL_CONTINUATION, room - count));
}

/** What a ServerError tells the user. */
export function sentenceOf({ message, retryAfter, code }) {
  if (code === TOO_LONG && !/max_tokens/.test(message)) return t("tooLong");
  return retryAfter ? `${sentence(message)} ${t("retryAfter", { count: retryAfter })}` : sentence(message);
}
