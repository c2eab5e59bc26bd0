// Markdown of answers as elements: headings, lists, quotes, code, tables, paragraphs. After CommonMark and GitHub's
// tables; without indented code, HTML and references, which answers of models seldom mean. Two things are shown that
// CommonMark loses: code that has no fence (unfenced.js), and how far a paragraph's lines are indented.
//
//     text -> blocks (plain data, each with its own source) -> one element each
//
// While a text grows, only the blocks whose source has changed are made again: so a selection stays, and each new token
// costs the last block alone.

import { copyText, el, iconButton } from "./dom.js";
import { inline } from "./inline.js";
import { t } from "./strings.js";
import { codeEnd } from "./unfenced.js";

const DEEPEST = 12;
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}(?! )|(?= {5})|$)(.*)$/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** Show Markdown in an element that this function alone fills. */
export function show(container, text) {
  const blocks = parse(text.replace(/\r\n?/g, "\n").split("\n"), 0);
  const before = container.shownSources ?? [];
  let same = 0;
  while (same < before.length && same < blocks.length && before[same] === blocks[same].source) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map(render));
  container.shownSources = blocks.map((block) => block.source);
}

function parse(lines, depth) {
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const [block, end] = blockAt(lines, i, depth);
    block.source = `${block.kind}\n${lines.slice(i, end).join("\n")}`;
    blocks.push(block);
    i = end;
  }
  return blocks;
}

function blockAt(lines, i, depth) {
  const line = untabbed(lines[i]);
  let found;
  if ((found = FENCE.exec(line))) return fenceAt(lines, i, found);
  const end = codeEnd(lines, i);
  // Before headings, since "# " begins a comment, too.
  if (end > i) return [{ kind: "code", language: "", text: lines.slice(i, end).join("\n") }, end];
  if ((found = HEADING.exec(line))) return [{ kind: "heading", level: found[1].length, text: found[2] ?? "" }, i + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, i + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quoteAt(lines, i, depth);
  if (depth < DEEPEST && ITEM.test(line)) return listAt(lines, i, depth);
  if (isTable(lines, i)) return tableAt(lines, i);
  return paragraphAt(lines, i, depth);
}

// Tabs at a line's beginning reach to the next multiple of four.
function untabbed(line) {
  return line.includes("\t") ? line.replace(/^[ \t]+/, (lead) => lead.replace(/\t/g, "    ")) : line;
}

// Not the wide blanks with which Chinese paragraphs begin: they stay.
const blanks = (line) => /^[ \t]*/.exec(line)[0].length;
const indent = (line) => line.length - line.trimStart().length;

function fenceAt(lines, i, [, lead, fence, info]) {
  const code = [];
  let end = i + 1;
  for (; end < lines.length; end += 1) {
    const closing = /^ {0,3}(`{3,}|~{3,})[ \t]*$/.exec(lines[end]);
    if (closing && closing[1][0] === fence[0] && closing[1].length >= fence.length) {
      end += 1;
      break;
    }
    code.push(lines[end].slice(Math.min(lead.length, indent(lines[end]))));
  }
  return [{ kind: "code", language: info.trim().split(/\s/)[0], text: code.join("\n") }, end];
}

function quoteAt(lines, i, depth) {
  const inside = [];
  let end = i;
  for (; end < lines.length; end += 1) {
    if (QUOTE.test(lines[end])) inside.push(lines[end].replace(QUOTE, ""));
    // A paragraph goes on without the mark.
    else if (lines[end].trim() && isParagraph(inside.at(-1)) && !interrupts(lines, end, depth)) inside.push(lines[end]);
    else break;
  }
  return [{ kind: "quote", blocks: parse(inside, depth + 1) }, end];
}

const isParagraph = (line) =>
  Boolean(line?.trim()) && ![FENCE, HEADING, RULE].some((pattern) => pattern.test(line.replace(/^[ >]+/, "")));

function listAt(lines, i, depth) {
  const [, , marker] = ITEM.exec(untabbed(lines[i]));
  const kind = marker.at(-1);
  const items = [];
  let end = i;
  let isLoose = false;
  while (end < lines.length) {
    const line = untabbed(lines[end]);
    const found = ITEM.exec(line);
    if (!found || found[2].at(-1) !== kind || (RULE.test(line) && !FENCE.test(line))) break;
    const width = found[1].length + found[2].length + (found[3].length || 1);
    const inside = [found[4]];
    let next = end + 1;
    let isFenced = FENCE.exec(found[4])?.[2];
    for (; next < lines.length; next += 1) {
      const more = untabbed(lines[next]);
      if (!more.trim()) {
        // An item that begins with an empty line ends there.
        if (inside.length === 1 && !inside[0].trim()) break;
        inside.push("");
      } else if (indent(more) >= width) {
        inside.push(more.slice(width));
        const fence = FENCE.exec(inside.at(-1))?.[2];
        if (fence) isFenced = isFenced ? null : fence;
      } else if (!isFenced && isParagraph(inside.at(-1)) && !interrupts(lines, next, depth, true)) {
        inside.push(more.trimStart());
      } else break;
    }
    let blanks = 0;
    while (inside.length > 1 && !inside.at(-1).trim()) {
      inside.pop();
      blanks += 1;
    }
    const blocks = parse(inside, depth + 1);
    if (blocks.length > 1 && hasGap(inside, blocks)) isLoose = true;
    items.push(blocks);
    end = next;
    const after = ITEM.exec(untabbed(lines[next] ?? ""));
    if (blanks && after && after[2].at(-1) === kind && !RULE.test(lines[next])) isLoose = true;
    else if (blanks) {
      end = next - blanks;
      break;
    }
  }
  const start = /\d/.test(marker) ? Number.parseInt(marker, 10) : null;
  return [{ kind: "list", start, items, isLoose }, end];
}

// Whether an empty line stands between two of the blocks, not inside one.
function hasGap(lines, blocks) {
  const inside = blocks.reduce((sum, block) => sum + block.source.split("\n").length - 1, 0);
  return lines.length > inside + (lines[0].trim() ? 0 : 1);
}

function cellsOf(line) {
  const cells = [];
  let cell = "";
  const body = line.trim().replace(/^\|/, "");
  for (let i = 0; i < body.length; i += 1) {
    if (body[i] === "\\" && body[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (body[i] === "|") {
      cells.push(cell.trim());
      cell = "";
    } else cell += body[i];
  }
  return cell.trim() ? [...cells, cell.trim()] : cells;
}

function isTable(lines, i) {
  return i + 1 < lines.length && lines[i].includes("|") && TABLE_RULE.test(lines[i + 1]) &&
    /[|:]/.test(lines[i + 1]) && cellsOf(lines[i]).length === cellsOf(lines[i + 1]).length;
}

function tableAt(lines, i) {
  const head = cellsOf(lines[i]);
  const aligned = cellsOf(lines[i + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : cell.startsWith(":") ? "left" : null);
  const rows = [];
  let end = i + 2;
  for (; end < lines.length && lines[end].trim() && !interrupts(lines, end, 0); end += 1) {
    const cells = cellsOf(lines[end]);
    rows.push(head.map((_, column) => cells[column] ?? ""));
  }
  return [{ kind: "table", head, aligned, rows }, end];
}

function interrupts(lines, i, depth, isInList = false) {
  const line = untabbed(lines[i]);
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  if (depth < DEEPEST && QUOTE.test(line)) return true;
  const item = depth < DEEPEST && ITEM.exec(line);
  // A line that happens to begin with a year is no list.
  const isFirst = item && item[4].trim() && (!/\d/.test(item[2]) || Number.parseInt(item[2], 10) === 1);
  if (item && (isInList || isFirst)) return true;
  return isTable(lines, i) || codeEnd(lines, i) > i;
}

function paragraphAt(lines, i, depth) {
  let end = i + 1;
  for (; end < lines.length && lines[end].trim(); end += 1) {
    const underline = UNDERLINE.exec(lines[end]);
    if (underline) {
      const level = underline[1][0] === "=" ? 1 : 2;
      return [{ kind: "heading", level, text: lines.slice(i, end).map((one) => one.trimStart()).join("\n") }, end + 1];
    }
    if (interrupts(lines, end, depth)) break;
  }
  return [{ kind: "paragraph", text: asIndented(lines.slice(i, end).map(untabbed)) }, end];
}

// Verses and drawings live by how far their lines are indented beyond each other; a single blank means nothing.
function asIndented(lines) {
  const least = Math.min(...lines.map(blanks));
  return lines.map((line) => line.slice(blanks(line) - least > 1 ? least : blanks(line))).join("\n");
}

function render(block) {
  switch (block.kind) {
    case "heading":
      return el(`h${block.level}`, {}, ...inline(block.text));
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, ...block.blocks.map(render));
    case "code":
      return codeBlock(block);
    case "list":
      return el(block.start === null ? "ul" : "ol", { start: block.start === 1 ? null : block.start },
        ...block.items.map((blocks) => item(blocks, block.isLoose)));
    case "table":
      return table(block);
    default:
      return el("p", {}, ...inline(block.text));
  }
}

function item(blocks, isLoose) {
  const isBare = (block) => !isLoose && block.kind === "paragraph";
  return el("li", {}, ...blocks.flatMap((block) => (isBare(block) ? inline(block.text) : [render(block)])));
}

function table({ head, aligned, rows }) {
  const cell = (tag) => (text, column) =>
    el(aligned[column] ? `${tag}.align-${aligned[column]}` : tag, {}, ...inline(text));
  return el("div.table", { tabindex: "0", role: "region", "aria-label": t("table") },
    el("table", {},
      el("thead", {}, el("tr", {}, ...head.map(cell("th")))),
      rows.length ? el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell("td"))))) : null));
}

function codeBlock({ language, text }) {
  const copy = iconButton("copy", t("copyCode"), async () => {
    if (!(await copyText(text))) return;
    copy.classList.add("is-done");
    setTimeout(() => copy.classList.remove("is-done"), 1200);
  });
  return el("div.code", {},
    el("div.code-head", {}, el("span", {}, language || t("code")), copy),
    el("pre", { tabindex: "0" }, el("code", {}, text)));
}
