// The panels beside the conversation, and how far it is scrolled.

const byId = (id) => document.getElementById(id);

/** Whether the panels lie over the conversation. */
export const isNarrow = () => matchMedia("(max-width: 60rem)").matches;

// While a panel lies over the page, the rest is out of reach.
function setPanel(panel, opener, isOpen) {
  panel.classList.toggle("is-open", isOpen);
  opener.setAttribute("aria-expanded", String(isOpen));
  const isOver = isOpen && isNarrow();
  byId("shade").hidden = !isOver;
  const hadFocus = panel.contains(document.activeElement);
  for (const part of document.querySelectorAll("main, #side, #settings")) part.inert = isOver && part !== panel;
  if (isOver) panel.querySelector("button").focus();
  else if (hadFocus && !isOpen) opener.focus();
}

/** Show or hide the list of conversations, which a wide screen always shows. */
export function setSide(isOpen) {
  setPanel(byId("side"), byId("open-side"), isOpen);
}

export function setOptions(isOpen) {
  byId("settings").hidden = !isOpen;
  setPanel(byId("settings"), byId("open-settings"), isOpen);
}

/** How many pixels of the conversation are below what is seen. */
function below() {
  const { scrollHeight, scrollTop, clientHeight } = byId("scroller");
  return scrollHeight - scrollTop - clientHeight;
}

/** Whether the end of the conversation is seen: then it stays so while an answer grows. */
export const isAtEnd = () => below() < 60;

export function toEnd() {
  byId("scroller").scrollTop = byId("scroller").scrollHeight;
}

/** Let the panels' buttons and the scrolled conversation do what they do. */
export function listenToPanels() {
  const close = () => {
    setSide(false);
    setOptions(false);
  };
  byId("open-side").addEventListener("click", () => setSide(true));
  byId("close-side").addEventListener("click", () => setSide(false));
  byId("open-settings").addEventListener("click", () => setOptions(byId("settings").hidden));
  byId("close-settings").addEventListener("click", () => setOptions(false));
  byId("shade").addEventListener("click", close);
  byId("jump").addEventListener("click", toEnd);
  byId("scroller").addEventListener("scroll", () => {
    byId("jump").hidden = below() < 200;
    document.querySelector("main").classList.toggle("is-scrolled", byId("scroller").scrollTop > 8);
  });
  document.addEventListener("keydown", (event) => {
    const isElsewhere = event.isComposing || document.querySelector("dialog[open], #menu");
    if (event.key === "Escape" && !isElsewhere && !byId("shade").hidden) close();
  });
}
