// An answer as the model made it: its tokens, coloured by probability, each with the five likeliest at its place; and
// the prompt as the model sees it.

import { el } from "./dom.js";
import { number, t } from "./strings.js";

let card = null; // the one open card
let owner = null; // the token that it belongs to

/** Text of a token with its blanks and line ends visible. */
function visible(text) {
  return text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍") || "∅";
}

function percent(logprob) {
  if (logprob === null) return "–";
  const value = 100 * Math.exp(logprob);
  return value > 0 && value < 0.01 ? "< 0.01 %" : `${number(value, value < 10 ? 2 : 1)} %`;
}

/** Show the tokens of an answer in `container`, and go on there as they come. */
export function showTokens(container, tokens) {
  let list = container.querySelector(".tokens");
  if (!list || container.shownTokens !== tokens) {
    list = el("div.tokens", { role: "listbox", "aria-label": t("tokenList") });
    const ends = [el("span", {}, t("likely")), el("i"), el("span", {}, t("surprising"))];
    const legend = el("div.legend", { "aria-hidden": "true" }, ...ends);
    container.replaceChildren(...(tokens.length ? [list, legend] : [el("p.quiet", {}, t("noTokens"))]));
    container.shownTokens = tokens;
    listen(list, tokens);
  }
  for (let i = list.childElementCount; i < tokens.length; i += 1) {
    const [text, , logprob] = tokens[i];
    const token = el("span.token", {
      role: "option", tabindex: i ? "-1" : "0",
      "aria-label": t("tokenLabel", { token: visible(text), percent: percent(logprob) }),
    }, text.replace(/\n/g, "↵\n"));
    token.style.setProperty("--surprise", logprob === null ? 0 : (1 - Math.exp(logprob)).toFixed(3));
    list.append(token);
  }
}

function listen(list, tokens) {
  const open = (event) => {
    const token = event.target.closest(".token");
    if (token) openCard(token, tokens[[...list.children].indexOf(token)]);
  };
  list.addEventListener("pointerover", open);
  list.addEventListener("focusin", open);
  list.addEventListener("click", open);
  list.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && !list.contains(document.activeElement)) closeCard();
  });
  list.addEventListener("focusout", closeCard);
  list.addEventListener("keydown", (event) => move(event, list));
}

// One stop of the Tab key for all tokens, and arrows between them.
function move(event, list) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
  if (event.key === "Escape") closeCard();
  if (!(event.key in steps)) return;
  event.preventDefault();
  const all = [...list.children];
  const place = all.indexOf(event.target) + steps[event.key];
  const next = all[Math.max(0, Math.min(all.length - 1, place))];
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function openCard(token, [text, id, logprob, alternatives]) {
  if (owner === token) return;
  closeCard();
  const own = ([otherText, otherId]) => (id !== null && otherId !== null ? id === otherId : text === otherText);
  const rows = alternatives.map((one) => row(one[0], one[2], own(one)));
  // What was drawn need not be among the likeliest.
  if (!alternatives.some(own)) rows.push(row(text, logprob, true));
  card = el("div.token-card", { role: "tooltip", id: "token-card" },
    el("div.token-card-head", {}, el("code", {}, visible(text)), el("span", {}, percent(logprob)),
      id === null ? null : el("span.quiet", {}, t("tokenId", { id }))),
    el("div.quiet", {}, t("alternatives")), el("ol", {}, ...rows));
  owner = token;
  token.setAttribute("aria-describedby", "token-card");
  token.classList.add("is-open");
  document.body.append(card);
  place();
}

function row(text, logprob, isChosen) {
  const bar = el("i");
  bar.style.width = `${100 * Math.exp(logprob ?? -99)}%`;
  return el(isChosen ? "li.is-chosen" : "li", {}, el("code", {}, visible(text)), el("span.bar", {}, bar),
    el("span", {}, percent(logprob)), isChosen ? el("span.visually-hidden", {}, t("chosen")) : null);
}

function place() {
  const at = owner.getClientRects()[0] ?? owner.getBoundingClientRect();
  const { width, height } = card.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, window.innerWidth - width - 8));
  const below = at.bottom + 6;
  const isBelow = below + height < window.innerHeight - 8 || at.top < height + 14;
  card.style.left = `${left}px`;
  card.style.top = `${isBelow ? below : at.top - height - 6}px`;
}

/** Close the card of a token. */
export function closeCard() {
  owner?.classList.remove("is-open");
  owner?.removeAttribute("aria-describedby");
  card?.remove();
  card = owner = null;
}

/** Section that shows a prompt's tokens [{id, text, is_control}, ...]. */
export function promptView(tokens) {
  const shown = tokens.map(({ id, text, is_control: isControl }) =>
    el(isControl ? "span.piece.is-control" : "span.piece", { title: t("tokenId", { id }) },
      text.replace(/\n/g, "↵\n")));
  return el("section.prompt", { "aria-label": t("promptTitle") }, el("h4", {}, t("promptTitle")),
    el("pre", { tabindex: "0" }, ...shown), el("p.quiet", {}, t("promptCount", { count: number(tokens.length) })));
}
