// Code that a model writes without a fence, as small ones do: a run of lines is taken for code if it has at least two
// points of evidence, no line of prose, and goes on over empty lines only to what is code by itself.
//
// Two points: a line that means nothing else, such as "def f(" or "from a import b". One: a line that prose hardly has,
// such as "self.x = 1", "return x", or "for x in y:" before a deeper line. None: assignments, comments, brackets and
// deeper lines, which go along. Two words beside each other, none of them a language's own, are prose; so are a
// sentence's end and a letter beyond ASCII. Texts in quotes and comments may hold anything.

const ENOUGH = 2;
const LONGEST_LINE = 1000;
const WORDS = new Set(("and as assert async await break case class continue def del elif else except finally for " +
  "from global if import in is lambda match nonlocal not or pass raise return try while with yield None True False " +
  "const let var function new typeof of export default public private protected static final void int long short " +
  "char float double bool boolean unsigned string String struct enum interface extends implements throws throw catch " +
  "switch do null true false fn func mut pub use impl type package auto template typename namespace using").split(" "));
const QUOTED = /(?<!\w)[bfruBFRU]{0,2}("""(?:(?!""").)*"""|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')/g;
const QUOTED_SO_FAR = new RegExp(QUOTED.source.replace(/\)$/, "|[\"'].*$)"), "g"); // for the last line
const REMARK = /(?:^|\s)(?:#|\/\/)(?: .*)?$/;
const REMARK_ALONE = /^(?:#|\/\/)(?: |$)/;
const NEIGHBOURS = /(?<!\w)([A-Za-z]\w*)(?= +([A-Za-z]\w*))/g;
// What begins another block; ">>> " is Python's prompt.
const MARKED = /^(?:[-*+] |\d{1,9}[.)] |>(?!>> )|\||(?:[-=*_] *){3,}$)/;

const STATEMENT = /^[^(=]*[(=].*[;{]$/;

// In these lines, texts in quotes are empty, and remarks are gone.
const CERTAIN = [
  /^(?:async )?def [\w\p{L}]+ ?\((?:[^()]*|.*(?:[)\]:([{,]|->[^:]*|\) ?: .*))$/u,
  /^class [A-Z_]\w* ?\(.*\) ?:/, /^from \.*\w[\w.]* import (?:\w|\*|\()/, /^if __name__ ?==/,
  /^print(?:f|ln)?\(.*\);?$/, /^#include ?[<"]/, /^#!\//, /^(?:if|for|while|switch|\} ?else if) ?\(.*\{$/,
  /^(?:const|let|var) \w+ = .*;$/, /^(?:console\.log|System\.out\.print\w*)\(.*\);?$/,
  /^(?:export )?(?:async )?function ?\*? ?\w* ?\(.*\{$/,
  /^(?:public|private|protected) (?:static )?[\w<>[\]]+ .*[{;]$/,
];
const LIKELY = [
  /(?<!\w)self\.\w/, /^(?:return|yield|raise|assert|del) /, /^@\w[\w.]*(?:\(.*\))?$/, /^\w+\.\w[\w.]*\(.*\);?$/,
  /^import (?:""|[\w.]+(?: as \w+)?(?:, ?[\w.]+(?: as \w+)?)*);?$/, /^package [\w.]+;?$/, STATEMENT,
  /^\w[\w.]*(?: ?: ?[\w[\], .]+)? ?= ?(?:[[{]|(?!(?:sin|cos|tan|log|exp|sqrt|max|min)\()\w[\w.]+\()/, // more than maths
  /^\w[\w.]* ?= ?.*[([{]$/, /^[[{]$/, /^""\s*:\s*\S/,
];
// Heads of blocks: likely if a deeper line follows.
const HEADS = [
  /^(?:if|elif|while|match|case|except) .+:$/, /^(?:async )?for .+ in .+:$/, /^(?:async )?with .*(?:\(| as ).*:$/,
  /^class [A-Z_]\w* ?:$/,
];
const GOES_ALONG = [
  /^[A-Za-z_][\w.]*(?:\[.*\])*(?:, ?[A-Za-z_][\w.]*)*(?: ?: ?[\w[\], .]+)? ?(?:[-+*/%|&^]|\*\*|\/\/)?=(?!=)/,
  /^[A-Za-z_][\w.]*\(.*[)({[,;]$/, /^[)\]}]+[,;:]?$/, /^(?:else|try|finally|except) ?:$/, /^""[,;]?$/,
  /^\} ?(?:else|catch|finally|while)\b.*[{;]$/, /^(?:return|pass|break|continue);?$/,
];
// The last line may still grow into one of these.
const MAY_GROW = /^(?:@?[a-z_][\w.]*(?:$| ?[[(=:+*/.,-])|""|(?:def|class|if|elif|while|for|with|import|from|return) )/;

const known = new WeakMap(); // lines -> {noneBefore, start, end}: what has been found in them

/** Number of the line after the code that begins at line `start`; `start` itself if none does. */
export function codeEnd(lines, start) {
  // Without this, lines that nearly are code would be read again from each of them.
  if (!known.has(lines)) known.set(lines, { noneBefore: 0, start: -1, end: -1 });
  const last = known.get(lines);
  if (start === last.start) return last.end;
  if (start < last.noneBefore) return start;
  const [end, points] = runAt(lines, start);
  if (points < ENOUGH) {
    last.noneBefore = Math.max(start + 1, end);
    return start;
  }
  [last.start, last.end] = [start, end];
  return end;
}

const indent = (line) => line.length - line.trimStart().length;

// Where the run of lines that begins here ends, and its points.
function runAt(lines, start) {
  const base = indent(lines[start]);
  let [end, points, depth] = [start, 0, 0]; // depth of open brackets
  if (REMARK_ALONE.test(lines[start].trimStart()) && !leadsOn(lines, start, start)) {
    return [remarksEnd(lines, start), 0];
  }
  for (let i = start; i < lines.length; i += 1) {
    if (!lines[i].trim()) continue;
    if (/^\s*(?:```|~~~)/.test(lines[i])) break;
    const line = read(lines, i);
    const isNext = i === end && i > start;
    const isWithin = i > start && (depth > 0 || indent(lines[i]) > base);
    // Right below code, deeper lines belong to it whatever they hold.
    const isIn = (isNext && isWithin) || (line.kind === "code" && (line.goesAlong || isWithin)) ||
      (line.kind === "remark" && (isNext || leadsOn(lines, i, start)));
    if (!isIn) break;
    points += line.points;
    depth = Math.max(0, depth + line.depth);
    if (line.opensText) i = textEnd(lines, i + 1, line.opensText, base) - 1;
    end = i + 1;
  }
  return [end, points];
}

function remarksEnd(lines, i) {
  let end = i + 1;
  while (end < lines.length && REMARK_ALONE.test(lines[end].trimStart())) end += 1;
  return end;
}

// A remark below an empty line belongs to the code right below it; at a text's end, such code may still come.
function leadsOn(lines, i, start) {
  const next = remarksEnd(lines, i);
  if (next === lines.length || (next === lines.length - 1 && !lines[next].trim())) return i > start;
  return Boolean(lines[next].trim()) && read(lines, next).goesAlong;
}

// The line after a text in three quotes; if it has no end, after the deeper lines.
function textEnd(lines, start, quotes, base) {
  let end = start;
  for (let i = start; i < lines.length; i += 1) if (lines[i].includes(quotes)) return i + 1;
  while (end < lines.length && (!lines[end].trim() || indent(lines[end]) > base)) end += 1;
  while (end > start && !lines[end - 1].trim()) end -= 1;
  return end;
}

// A line that is not empty: its kind ("code", "remark", "prose"), points, whether it goes along with code above it, how
// many brackets it opens, and the quotes of a text that goes on below it.
function read(lines, i) {
  const whole = lines[i].trim();
  const line = { kind: "prose", points: 0, goesAlong: false, depth: 0, opensText: null };
  if (whole.length > LONGEST_LINE || MARKED.test(whole)) return line;
  if (REMARK_ALONE.test(whole)) return { ...line, kind: "remark" };
  const prompted = whole.replace(/^>>> /, "");
  const quotes = /"""|'''/.exec(prompted)?.[0];
  if (quotes && prompted.split(quotes).length % 2 === 0) line.opensText = quotes;
  const shown = line.opensText ? `${prompted.slice(0, prompted.lastIndexOf(quotes))}""` : prompted;
  const isLast = i === lines.length - 1;
  const code = shown.replace(isLast ? QUOTED_SO_FAR : QUOTED, '""').replace(REMARK, "").trimEnd();
  const fits = (patterns) => patterns.some((one) => one.test(code));
  const isCertain = fits(CERTAIN);
  if (isSaid(code, isCertain || (isLast && /^[a-z].*[.=(]/.test(code)))) return { ...line, opensText: null };
  const isHead = fits(HEADS);
  const isDeep = indent(lines[i]) >= 4;
  const isFollowed = i + 1 < lines.length && indent(lines[i + 1]) > indent(lines[i]);
  if (isCertain || (isDeep && /^(?:return|yield) ./.test(code))) line.points = 2;
  else if (fits(LIKELY) || (isHead && isFollowed)) line.points = 1;
  line.goesAlong = line.points > 0 || isHead || fits(GOES_ALONG) || (isLast && MAY_GROW.test(code));
  if (prompted !== whole && line.goesAlong) line.points = 2;
  line.depth = code.split(/[([{]/).length - code.split(/[)\]}]/).length;
  return { ...line, kind: "code" };
}

// Whether a line is prose. Only a line that is code for certain may end as sentences do, or have letters of any script.
function isSaid(code, isFree) {
  if (!isFree && /[^\x00-\x7f]|[.?!]$/.test(code)) return true;
  const neighbours = [...code.matchAll(NEIGHBOURS)].filter(([, one, next]) => !WORDS.has(one) && !WORDS.has(next));
  // As in "Tree tree = new Tree();".
  return neighbours.length > (STATEMENT.test(code) ? 1 : 0);
}
