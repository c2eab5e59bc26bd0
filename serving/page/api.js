// The server's API: models, streamed answers, prompts as tokens. A stream's chunks are gathered into one plain object,
// the same for conversations and for texts to continue.

import { t } from "./strings.js";

const KEY = "zero2all.key";
/** Tokens of a continuation whose user says nothing: the API's own default of 16 is for tests. */
export const USUAL_CONTINUATION = 256;
export const ALTERNATIVES = 5;

/** What the server says when it does not answer: a sentence for the user. */
export class ServerError extends Error {
  constructor(message, { status, retryAfter, code } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, code });
  }
}

let askForKey = async () => null;

/** Set the function that asks the user for an API key: it gets whether one was refused, and gives a key or null. */
export function setKeyQuestion(ask) {
  askForKey = ask;
}

let unkept = null; // where the browser keeps nothing

function keptKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return unkept;
  }
}

function keepKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    unkept = key;
  }
}

async function call(path, body, signal, mayAsk = true) {
  for (;;) {
    const key = keptKey();
    const headers = { ...(body && { "Content-Type": "application/json" }) };
    if (key) headers.Authorization = `Bearer ${key}`;
    const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(t("unreachable"));
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await problemOf(response);
    // Another request may have brought a new key meanwhile.
    if (keptKey() === key) {
      if (!mayAsk) throw new ServerError(t("needsKey"), { status: 401 });
      const given = await askForKey(key !== null);
      signal?.throwIfAborted();
      if (given === null) throw new ServerError(t("needsKey"), { status: 401 });
      keepKey(given);
    }
  }
}

async function problemOf(response) {
  const { status } = response;
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  try {
    const { message, code } = (await response.json()).error;
    return new ServerError(String(message), { status, retryAfter, code });
  } catch {
    return new ServerError(t("badAnswer", { status }), { status, retryAfter });
  }
}

/** Models that the server offers, the default first. `mayAsk`: whether the user may be asked for a key. */
export async function models(mayAsk) {
  return (await (await call("/v1/models", null, null, mayAsk)).json()).data;
}

/** How many tokens a conversation or a text has, and which. */
export async function tokenize(body, signal) {
  return (await call("/tokenize", { ...body, show_prompt: true }, signal)).json();
}

/** Events of a streamed answer, parsed. Ends at [DONE]; a stream that ends earlier was lost. */
async function* events(path, body, signal) {
  const response = await call(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(t("lost"));
    }
    if (part.done) throw new ServerError(t("lost"));
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/**
 * Fill `answer` as its stream arrives: content, tokens [[text, id, logprob, alternatives], ...], finish, promptTokens,
 * count, seconds, rate; `onChange` is called after each event.
 * @param {Object} request {messages} or {prompt}, with model and sampling
 */
export async function generate(request, answer, signal, onChange) {
  const began = performance.now();
  let first = null;
  const isChat = "messages" in request;
  const path = isChat ? "/v1/chat/completions" : "/v1/completions";
  const body = {
    ...request, stream: true, stream_options: { include_usage: true }, return_token_ids: true, return_timings: true,
    ...(isChat ? { logprobs: true, top_logprobs: ALTERNATIVES, show_prompt: true } : { logprobs: ALTERNATIVES }),
  };
  for await (const event of events(path, body, signal)) {
    if (event.error) throw new ServerError(String(event.error.message));
    if (event.prompt) answer.promptTokens = event.prompt;
    for (const choice of event.choices) {
      answer.content += (isChat ? choice.delta.content : choice.text) ?? "";
      answer.tokens.push(...(isChat ? chatTokens(choice.logprobs) : textTokens(choice)));
      if (choice.finish_reason) answer.finish = choice.finish_reason;
    }
    if (answer.tokens.length) first ??= performance.now();
    measure(answer, event, began, first);
    onChange();
  }
}

function measure(answer, { usage, timings }, began, first) {
  answer.count = usage?.completion_tokens ?? answer.tokens.length;
  if (usage) {
    answer.total = usage.total_tokens;
    answer.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
  const passed = performance.now() - (first ?? 0);
  // The server's own measure, where it gives one, has no network in it.
  if (timings) [answer.seconds, answer.rate] = [timings.first_token_s, timings.tokens_per_second];
  else if (first !== null) {
    answer.seconds = (first - began) / 1000;
    answer.rate = passed > 200 ? (1000 * (answer.tokens.length - 1)) / passed : null;
  }
}

// Three digits are more than a screen shows, and the browser's storage is small.
const short = (logprob) => (logprob === null ? null : Math.round(logprob * 1000) / 1000);

function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map((one) => [
    one.token, one.id ?? null, short(one.logprob),
    one.top_logprobs.slice(0, ALTERNATIVES).map((other) => [other.token, other.id ?? null, short(other.logprob)]),
  ]);
}

function textTokens({ logprobs, token_ids: ids }) {
  const name = (token) => (token.startsWith("token_id:") ? "\uFFFD" : token);
  return (logprobs?.tokens ?? []).map((token, i) => {
    const others = Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((one, other) => other[1] - one[1]);
    return [
      name(token), ids?.[i] ?? null, short(logprobs.token_logprobs[i]),
      others.slice(0, ALTERNATIVES).map(([text, logprob]) => [name(text), null, short(logprob)]),
    ];
  });
}
