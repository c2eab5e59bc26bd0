// Markdown inside a line: emphasis, code, links. After CommonMark's description of delimiter runs
// (https://spec.commonmark.org/0.31.2/#phase-2-inline-structure), with these differences:
//   - HTML, entities and pictures are text or links: nothing is loaded, nothing is parsed as HTML;
//   - only http(s) and mailto are links;
//   - a line's end is a line's end, and blanks at its beginning stay, since models write verses and addresses;
//   - ** beside a Chinese, Japanese or Korean character opens and closes also at punctuation, as their writers expect.
// All of it takes linear time and bounded depth, whatever a model writes.

import { el } from "./dom.js";

const DEEPEST = 24;
const LONGEST_RUN = 6;
const PLAIN = /(?:(?!https?:\/\/)[^\\`<*_~![\]\n])+/y;
const AUTOLINK = /<(https?:\/\/[^\s<>]*|mailto:[^\s<>]*)>/iy;
const MAIL = /<([\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8})>/y;
const BARE = /https?:\/\/[^\s<>"`\\，。、；：！？（）【】「」《》“”]+/iy;
const ADDRESS = /<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*)/.source;
const TITLE = /"[^"]*"|'[^']*'|\([^()]*\)/.source;
const TARGET = new RegExp(`\\([ \\n]*(?:${ADDRESS})(?:[ \\n]+(?:${TITLE}))?[ \\n]*\\)`, "y");
const ESCAPED = /[!-/:-@[-`{-~]/;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const WIDE = /[\u2E80-\u9FFF\uAC00-\uD7AF\uF900-\uFAFF\uFF00-\uFFEF]/;

function at(pattern, text, position) {
  pattern.lastIndex = position;
  return pattern.exec(text);
}

/** The address, if one may follow it; else null. */
export function safeAddress(address) {
  if (!/^(https?:\/\/|mailto:)[^\s\x00-\x20\x7f]+$/i.test(address)) return null;
  try {
    return new URL(address).href;
  } catch {
    return null;
  }
}

/** Nodes that show a text with its inline Markdown. */
export function inline(text) {
  return build(scan(text.replace(/^\n+|[ \t\n]+$/g, "")), false);
}

// First pass: a list of pieces. A link takes the pieces between its brackets, before emphasis is looked for.
function scan(text) {
  const pieces = [];
  const without = new Set(); // lengths of backtick runs that have no closing one
  let brackets = []; // places of open brackets in pieces
  let i = 0;
  const say = (more) => {
    const last = pieces.at(-1);
    if (last?.kind === "text") last.text += more;
    else pieces.push({ kind: "text", text: more });
  };
  const indent = () => {
    const from = i;
    while (text[i] === " ") i += 1;
    if (i > from) pieces.push({ kind: "indent", text: text.slice(from, i) });
  };
  indent();
  while (i < text.length) {
    const c = text[i];
    let found;
    if (c === "\\" && text[i + 1] === "\n") {
      pieces.push({ kind: "break" });
      i += 2;
      indent();
    } else if (c === "\\" && ESCAPED.test(text[i + 1] ?? "")) {
      say(text[i + 1]);
      i += 2;
    } else if (c === "\n") {
      pieces.push({ kind: "break" });
      i += 1;
      indent();
    } else if (c === "`") {
      const [code, length] = codeAt(text, i, without);
      if (code === null) say("`".repeat(length));
      else pieces.push({ kind: "code", text: code });
      i += length;
    } else if (c === "<" && (found = at(AUTOLINK, text, i) ?? at(MAIL, text, i))) {
      const address = safeAddress(found[1].includes(":") ? found[1] : `mailto:${found[1]}`);
      if (address) pieces.push({ kind: "address", text: found[1], address });
      else say(found[0]);
      i += found[0].length;
    } else if (c === "*" || c === "_" || c === "~") {
      let end = i;
      while (text[end] === c) end += 1;
      pieces.push(run(text, i, end));
      i = end;
    } else if (c === "[" || (c === "!" && text[i + 1] === "[")) {
      brackets.push(pieces.length);
      pieces.push({ kind: "bracket", text: c === "[" ? "[" : "![" });
      i += c === "[" ? 1 : 2;
    } else if (c === "]") {
      const open = brackets.pop();
      const target = open === undefined ? null : at(TARGET, text, i + 1);
      const address = target && safeAddress((target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
      if (!address) {
        say("]");
        i += 1;
        continue;
      }
      const [bracket, ...inside] = pieces.splice(open);
      pieces.push({ kind: "link", pieces: inside, address });
      // No link holds another one.
      if (bracket.text === "[") brackets = [];
      i += 1 + target[0].length;
    } else if ((found = at(BARE, text, i)) && !/[\p{L}\p{N}]/u.test(text[i - 1] ?? "")) {
      const shown = withoutTail(found[0]);
      const address = safeAddress(shown);
      if (address) pieces.push({ kind: "address", text: shown, address });
      else say(shown);
      i += shown.length;
    } else {
      const plain = at(PLAIN, text, i)?.[0] ?? c;
      // Blanks at a line's end do not count.
      say(text[i + plain.length] === "\n" ? plain.replace(/ {1,99}$/, "") : plain);
      i += plain.length;
    }
  }
  return pieces;
}

function codeAt(text, start, without) {
  let end = start;
  while (text[end] === "`") end += 1;
  const length = end - start;
  for (let i = end; i < text.length && !without.has(length); ) {
    const from = text.indexOf("`", i);
    if (from < 0) break;
    i = from;
    while (text[i] === "`") i += 1;
    if (i - from !== length) continue;
    let code = text.slice(end, from).replace(/\n/g, " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
    return [code, i - start];
  }
  without.add(length);
  return [null, length];
}

// A sentence's punctuation after an address is not part of it, nor is a bracket that it does not open.
function withoutTail(address) {
  let end = address.length;
  for (;;) {
    const last = address[end - 1];
    const body = address.slice(0, end);
    if (/[?!.,:;*_~']/.test(last)) end -= 1;
    else if (last === ")" && body.split(")").length > body.split("(").length) end -= 1;
    else return body;
    if (address.length - end > 20) return address;
  }
}

function run(text, start, end) {
  const mark = text[start];
  const count = end - start;
  const whole = { kind: "text", text: text.slice(start, end) };
  if (count > LONGEST_RUN || (mark === "~" && count !== 2)) return whole;
  const before = start ? text[start - 1] : " ";
  const after = end < text.length ? text[end] : " ";
  const isBlank = (one) => /\s/.test(one);
  const isMark = (one) => PUNCTUATION.test(one);
  const isWide = (one) => mark !== "_" && WIDE.test(one);
  const left = !isBlank(after) && (!isMark(after) || isBlank(before) || isMark(before) || isWide(before));
  const right = !isBlank(before) && (!isMark(before) || isBlank(after) || isMark(after) || isWide(after));
  if (mark !== "_") return { kind: "run", mark, count, opens: left, closes: right, length: count };
  return {
    kind: "run", mark, count, length: count,
    opens: left && (!right || isMark(before)), closes: right && (!left || isMark(after)),
  };
}

// Second pass: a stack of frames, one for each run of marks that may still be closed. When one is, the frames above it
// turn into text.
function build(pieces, isInLink) {
  const frames = [{ nodes: [] }];
  const bottoms = {}; // below which no opener has been found, for each kind of closer
  const fold = (height) => {
    while (frames.length > height) {
      const { run, nodes } = frames.pop();
      append(frames.at(-1).nodes, run.mark.repeat(run.count), ...nodes);
    }
  };
  for (const piece of pieces) {
    const top = frames.at(-1).nodes;
    if (piece.kind === "run") {
      const left = piece.closes ? close(piece, frames, bottoms, fold) : piece.count;
      if (!left) continue;
      if (piece.opens && frames.length < DEEPEST) frames.push({ run: { ...piece, count: left }, nodes: [] });
      else append(frames.at(-1).nodes, piece.mark.repeat(left));
    } else if (piece.kind === "break") top.push(el("br"));
    else if (piece.kind === "indent") top.push(el("span.indent", {}, piece.text));
    else if (piece.kind === "code") top.push(el("code", {}, piece.text));
    else if (piece.kind === "address") top.push(isInLink ? piece.text : anchor(piece.address, [piece.text]));
    else if (piece.kind === "link") {
      const inside = build(piece.pieces, true);
      if (isInLink) append(top, ...inside);
      else top.push(anchor(piece.address, inside));
    } else append(top, piece.text);
  }
  fold(1);
  return frames[0].nodes;
}

function close(closer, frames, bottoms, fold) {
  let left = closer.count;
  while (left) {
    const kind = `${closer.mark}${closer.opens}${closer.length % 3}`;
    const bottom = Math.min(bottoms[kind] ?? 1, frames.length);
    let place = frames.length - 1;
    while (place >= bottom && !matches(frames[place].run, closer)) place -= 1;
    if (place < bottom) {
      bottoms[kind] = frames.length;
      break;
    }
    fold(place + 1);
    const frame = frames[place];
    const used = closer.mark === "~" || (left >= 2 && frame.run.count >= 2) ? 2 : 1;
    const element = el(closer.mark === "~" ? "del" : used === 2 ? "strong" : "em", {}, ...frame.nodes);
    left -= used;
    frame.run.count -= used;
    if (frame.run.count) frame.nodes = [element];
    else {
      frames.pop();
      frames.at(-1).nodes.push(element);
    }
  }
  return left;
}

function matches(opener, closer) {
  if (opener.mark !== closer.mark) return false;
  const isOdd = (opener.closes || closer.opens) && (opener.length + closer.length) % 3 === 0;
  return !isOdd || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function append(nodes, ...more) {
  for (const one of more) {
    if (typeof one === "string" && typeof nodes.at(-1) === "string") nodes[nodes.length - 1] += one;
    else nodes.push(one);
  }
}

function anchor(address, nodes) {
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...nodes);
}
