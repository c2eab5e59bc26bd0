// The messages of a conversation on the page. Draws what it is given, and tells the page which button was used.

import { copyText, el, icon, iconButton } from "./dom.js";
import { show } from "./markdown.js";
import { number, t } from "./strings.js";
import { closeCard, promptView, showTokens } from "./tokens.js";

export class Thread {
  /**
   * @param {HTMLElement} root
   * @param {Object} actions regenerate(), edit(index, text), prompt(index) -> tokens
   */
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.isShowingTokens = false;
    this.views = [];
  }

  /** Show a conversation, of which the last message may still be written. */
  show(conversation, isWriting) {
    closeCard();
    this.conversation = conversation;
    this.root.classList.toggle("is-text", conversation.kind === "text");
    this.views = conversation.messages.map((message, index) => this.view(message, index));
    this.root.replaceChildren(...this.views.map((view) => view.element));
    this.views.forEach((_, index) => this.update(index, isWriting && index === this.views.length - 1));
  }

  view(message, index) {
    const isUser = message.role === "user";
    const body = el("div.body", isUser ? {} : { "aria-busy": "false" });
    const foot = el("div.foot");
    const label = isUser ? t("you") : message.model ?? t("assistant");
    const element = el(`article.message.is-${message.role}`, { "aria-label": label }, body, foot);
    if (isUser) body.textContent = message.content;
    return { element, body, foot, index, isShowingTokens: null };
  }

  /** Draw a message as it now is. */
  update(index, isWriting) {
    const view = this.views[index];
    const message = this.conversation.messages[index];
    if (message.role === "user") {
      // A question without an answer, as in a file that was imported.
      const isOpen = this.conversation.kind === "chat" && index === this.views.length - 1;
      view.foot.replaceChildren(el("div.buttons", {}, this.copyButton(message), this.editButton(view),
        isOpen ? iconButton("again", t("generate"), () => this.actions.regenerate()) : null));
      return;
    }
    this.drawAnswer(view, message, isWriting);
    view.body.setAttribute("aria-busy", String(isWriting));
    view.element.classList.toggle("is-writing", isWriting);
    const facts = el("p.facts", {}, ...factsOf(message).map((fact) => el("span", {}, fact)));
    // What begins a conversation has no question to answer again.
    const isLast = index > 0 && index === this.views.length - 1;
    if (isWriting) {
      view.foot.replaceChildren(facts);
      return;
    }
    const buttons = el("div.buttons", {}, this.copyButton(message),
      isLast ? iconButton("again", t("regenerate"), () => this.actions.regenerate()) : null,
      iconButton("tokens", t("tokensHint"), () => {
        view.isShowingTokens = !this.showsTokens(view);
        this.update(index, false);
      }, { "aria-pressed": String(this.showsTokens(view)) }),
      this.promptButton(view));
    const problem = problemOf(message, isLast && (() => this.actions.regenerate()));
    const parts = [problem, el("div.line", {}, buttons, facts), view.prompt];
    view.foot.replaceChildren(...parts.filter(Boolean));
  }

  showsTokens(view) {
    return view.isShowingTokens ?? this.isShowingTokens;
  }

  drawAnswer(view, message, isWriting) {
    const shown = this.showsTokens(view) ? "tokens" : "text";
    if (view.shown !== shown) {
      view.shown = shown;
      view.body.replaceChildren();
      delete view.body.shownTokens;
      delete view.body.shownSources;
      view.body.classList.toggle("is-markdown", shown === "text" && this.conversation.kind === "chat");
    }
    if (shown === "tokens" && (message.tokens?.length || !isWriting)) showTokens(view.body, message.tokens ?? []);
    else if (!message.content && !isWriting && message.finish) view.body.replaceChildren(el("p.quiet", {}, t("empty")));
    else if (this.conversation.kind === "text") view.body.textContent = message.content;
    else show(view.body, message.content);
  }

  copyButton(message) {
    const button = iconButton("copy", t("copy"), async () => {
      if (!(await copyText(this.textOf(message)))) return;
      button.replaceChildren(icon("check"));
      button.setAttribute("aria-label", t("copied"));
      setTimeout(() => {
        button.replaceChildren(icon("copy"));
        button.setAttribute("aria-label", t("copy"));
      }, 1500);
    });
    return button;
  }

  // Parts of a continued text are copied together.
  textOf(message) {
    const { kind, messages } = this.conversation;
    return kind === "text" ? messages.map((one) => one.content).join("") : message.content;
  }

  editButton(view) {
    return iconButton("edit", t("edit"), () => this.edit(view));
  }

  edit(view) {
    const area = el("textarea", { "aria-label": t("editing"), rows: "1" });
    area.value = this.conversation.messages[view.index].content;
    const close = () => {
      view.element.classList.remove("is-edited");
      view.body.replaceChildren(this.conversation.messages[view.index].content);
      this.update(view.index, false);
      view.foot.querySelector(`[aria-label="${t("edit")}"]`)?.focus();
    };
    const send = () => {
      if (area.value.trim()) this.actions.edit(view.index, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (sends(event)) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape" && !event.isComposing) close();
    });
    area.addEventListener("input", () => grow(area));
    view.element.classList.add("is-edited");
    view.body.replaceChildren(area);
    view.foot.replaceChildren(el("div.row", {}, el("button.button", { type: "button", onclick: close }, t("cancel")),
      el("button.button.is-first", { type: "button", onclick: send }, t("saveSend"))));
    grow(area);
    area.focus();
  }

  promptButton(view) {
    const button = iconButton("prompt", t("promptHint"), async () => {
      if (view.prompt) view.prompt = null;
      else {
        try {
          view.prompt = promptView(await this.actions.prompt(view.index));
        } catch (error) {
          view.prompt = el("p.problem", { role: "alert", tabindex: "-1" }, error.message);
        }
      }
      this.update(view.index, false);
      // It opens below a long answer, out of sight: who asked for it is brought there.
      (view.prompt?.querySelector("pre") ?? view.prompt ?? view.foot.querySelector('[data-icon="prompt"]')).focus();
      view.prompt?.scrollIntoView({ block: "nearest" });
    }, { "aria-expanded": String(Boolean(view.prompt)) });
    return button;
  }
}

function factsOf({ count, rate, seconds, cached }) {
  const facts = [];
  if (count) facts.push(count === 1 ? t("oneToken") : t("count", { count: number(count) }));
  if (rate) facts.push(t("rate", { rate: number(rate, rate < 100 ? 1 : 0) }));
  if (count && seconds !== undefined) facts.push(t("first", { seconds: number(seconds, seconds < 10 ? 2 : 1) }));
  if (cached) facts.push(t("cached", { count: number(cached) }));
  return facts;
}

function problemOf({ error, finish, forgotten }, retry) {
  const ends = { length: t("cutAtLength"), cancelled: t("stopped") };
  const end = finish ? ends[finish] : t("unfinished");
  const notes = [forgotten ? t("forgotten", { count: number(forgotten) }) : null, end].filter(Boolean);
  if (!error) return notes.length ? el("p.quiet.finish", {}, notes.join(" ")) : null;
  return el("div.problem", { role: "alert" }, el("p", {}, error),
    retry ? el("button.button", { type: "button", onclick: retry }, icon("again"), t("retry")) : null);
}

/** Whether a key sends a text. While an input method composes, Enter chooses a word; Safari tells that by 229 alone. */
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** Make a field as high as its text, up to what its style allows. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}
