// All texts of the page, in its two languages. A text is a key here; {name} in it stands for a value.

export const STRINGS = {
  en: {
    // Frame
    newChat: "New conversation", conversations: "Conversations", openList: "Show conversations", closeList: "Hide conversations",
    settings: "Settings", closeSettings: "Close settings", model: "Model", skip: "Skip to the message field", untitled: "Untitled",
    modelStep: "{name} · step {step}", more: "Actions for “{title}”", close: "Close",
    // Start
    greeting: "What shall we talk about?", greetingText: "Begin a text", context: "{model} · {count} tokens of context",
    modeChat: "Conversation", modeText: "Continue a text", mode: "Mode",
    textOnly: "This model continues texts. Write a beginning, and it goes on.",
    // Composer
    message: "Message", messageHint: "Write a message", textHint: "Write the beginning of a text", textMore: "Write on, or let the model continue",
    send: "Send", continue: "Continue", stop: "Stop", keys: "Enter sends · Shift + Enter for a new line",
    used: "{count} of {all} tokens", jump: "Jump to the latest",
    // Messages
    you: "You", assistant: "Assistant", copy: "Copy", copied: "Copied", copyCode: "Copy code", code: "code", table: "Table", edit: "Edit",
    regenerate: "Generate again", retry: "Try again", saveSend: "Send", cancel: "Cancel", editing: "Edit the message",
    writing: "Writing …", done: "Answer: {text}", empty: "(an empty answer)",
    cutAtLength: "Cut at the limit of tokens.", stopped: "Stopped.", lost: "The connection was lost. What had arrived is kept.",
    unreachable: "The server cannot be reached. Is it running?", needsKey: "The server needs an API key.",
    badAnswer: "The server's answer could not be read (HTTP {status}).", retryAfter: "Try again in {count} s.",
    noModels: "The server offers no model.",
    // Learning
    tokens: "Tokens", tokensHint: "Show each token's probability", prompt: "Prompt", promptHint: "Show the prompt as the model sees it",
    promptTitle: "The prompt as the model sees it", promptCount: "{count} tokens; control tokens are framed.",
    tokenList: "Tokens of the answer; arrow keys move between them", likely: "likely", surprising: "surprising", chosen: "chosen",
    alternatives: "Likeliest tokens", tokenId: "id {id}", noTokens: "No probabilities are kept for this answer.",
    tokenLabel: "{token}, {percent}", rate: "{rate} tokens/s", first: "first token after {seconds} s", count: "{count} tokens", oneToken: "1 token",
    cached: "{count} of the prompt cached",
    // Settings
    system: "System prompt", systemHint: "How the model should behave, in this conversation", sampling: "Sampling", reset: "Reset",
    temperature: "Temperature", temperatureHint: "0 takes the likeliest token; higher is more varied",
    top_p: "Top p", top_pHint: "Only the likeliest tokens that together reach this probability",
    top_k: "Top k", top_kHint: "Only this many of the likeliest tokens; 0 takes all",
    min_p: "Min p", min_pHint: "Only tokens at least this likely, relative to the likeliest",
    repetition_penalty: "Repetition penalty", repetition_penaltyHint: "Above 1, tokens already in the text become less likely",
    presence_penalty: "Presence penalty", presence_penaltyHint: "Above 0, tokens that the answer already has become less likely",
    frequency_penalty: "Frequency penalty", frequency_penaltyHint: "The same, more so the more often they occurred",
    max_tokens: "Most tokens", max_tokensHint: "Longest answer; empty: as much as fits", max_tokensText: "Longest continuation; empty: {count}",
    seed: "Seed", seedHint: "The same seed gives the same answer; empty: another each time", stopTexts: "Stop at",
    stopTextsHint: "One text a line; \\n stands for a line's end", usual: "usual", random: "random",
    invalid: "{name}: write a number from {low} to {high}.", appearance: "Appearance", language: "Language", automatic: "Automatic", theme: "Theme",
    system_theme: "System", light: "Light", dark: "Dark", data: "Conversations in this browser", exportAll: "Export all", import: "Import",
    stored: "They are kept in this browser alone.",
    // Conversations
    rename: "Rename", renameTitle: "Name of the conversation", delete: "Delete", deleteTitle: "Delete “{title}”?",
    deleteText: "It is kept nowhere else.", exportJson: "Export as JSON", exportMarkdown: "Export as Markdown",
    imported: "Imported: {count}", notImported: "{file} is not an export of this page.", full: "The browser's storage is full: this conversation is not saved. Export it, or delete others.",
    lean: "The browser's storage is nearly full: probabilities of older answers were let go.", unsaved: "The browser stores nothing for this page: conversations end with it.",
    // Key
    keyTitle: "API key", keyText: "This server asks for a key. It is kept until this tab is closed.", keyWrong: "The server refused this key.", ok: "OK", save: "Save",
  },
  zh: {
    newChat: "新对话", conversations: "对话", openList: "显示对话列表", closeList: "隐藏对话列表",
    settings: "设置", closeSettings: "关闭设置", model: "模型", skip: "跳到输入框", untitled: "未命名",
    modelStep: "{name} · 第 {step} 步", more: "“{title}”的操作", close: "关闭",
    greeting: "想聊点什么？", greetingText: "写一个开头", context: "{model} · 上下文 {count} 个词元",
    modeChat: "对话", modeText: "续写文本", mode: "模式",
    textOnly: "这个模型只会续写文本。写个开头，它会接着写。",
    message: "消息", messageHint: "输入消息", textHint: "写下文本的开头", textMore: "接着写，或让模型继续",
    send: "发送", continue: "继续", stop: "停止", keys: "Enter 发送 · Shift + Enter 换行",
    used: "已用 {count} / {all} 个词元", jump: "跳到最新",
    you: "你", assistant: "助手", copy: "复制", copied: "已复制", copyCode: "复制代码", code: "代码", table: "表格", edit: "编辑",
    regenerate: "重新生成", retry: "重试", saveSend: "发送", cancel: "取消", editing: "编辑消息",
    writing: "正在生成……", done: "回答：{text}", empty: "（空回答）",
    cutAtLength: "达到长度上限，已截断。", stopped: "已停止。", lost: "连接中断，已收到的内容保留在此。",
    unreachable: "无法连接服务器。它在运行吗？", needsKey: "服务器需要 API 密钥。",
    badAnswer: "无法读懂服务器的回复（HTTP {status}）。", retryAfter: "请在 {count} 秒后重试。",
    noModels: "服务器没有提供模型。",
    tokens: "词元", tokensHint: "显示每个词元的概率", prompt: "提示词", promptHint: "显示模型看到的提示词",
    promptTitle: "模型看到的提示词", promptCount: "共 {count} 个词元；带框的是控制词元。",
    tokenList: "回答的词元；用方向键移动", likely: "意料之中", surprising: "出人意料", chosen: "选中",
    alternatives: "最可能的词元", tokenId: "编号 {id}", noTokens: "这个回答没有保存概率。",
    tokenLabel: "{token}，{percent}", rate: "{rate} 词元/秒", first: "首个词元 {seconds} 秒", count: "{count} 个词元", oneToken: "1 个词元",
    cached: "提示词中 {count} 个来自缓存",
    system: "系统提示词", systemHint: "希望模型在这个对话中如何表现", sampling: "采样", reset: "重置",
    temperature: "温度", temperatureHint: "0 总是取最可能的词元；越高越多样",
    top_p: "Top p", top_pHint: "只取累计概率达到此值的最可能词元",
    top_k: "Top k", top_kHint: "只取最可能的这么多个词元；0 为全部",
    min_p: "Min p", min_pHint: "只取概率不低于最大概率乘以此值的词元",
    repetition_penalty: "重复惩罚", repetition_penaltyHint: "大于 1 时，文中出现过的词元更难再现",
    presence_penalty: "存在惩罚", presence_penaltyHint: "大于 0 时，回答中出现过的词元更难再现",
    frequency_penalty: "频率惩罚", frequency_penaltyHint: "同上，出现次数越多惩罚越大",
    max_tokens: "最多词元", max_tokensHint: "回答的最大长度；留空则用满上下文", max_tokensText: "续写的最大长度；留空为 {count}",
    seed: "随机种子", seedHint: "种子相同则回答相同；留空每次不同", stopTexts: "停止文本",
    stopTextsHint: "每行一个；\\n 表示换行", usual: "默认", random: "随机",
    invalid: "{name}：请填写 {low} 到 {high} 之间的数。", appearance: "外观", language: "语言", automatic: "自动", theme: "主题",
    system_theme: "跟随系统", light: "浅色", dark: "深色", data: "此浏览器中的对话", exportAll: "全部导出", import: "导入",
    stored: "对话只保存在此浏览器中。",
    rename: "重命名", renameTitle: "对话名称", delete: "删除", deleteTitle: "删除“{title}”？",
    deleteText: "别处没有备份。", exportJson: "导出为 JSON", exportMarkdown: "导出为 Markdown",
    imported: "已导入 {count} 个", notImported: "{file} 不是本页面导出的文件。", full: "浏览器存储空间已满，此对话未能保存。请导出它，或删除其他对话。",
    lean: "浏览器存储空间将满，已舍去较早回答的概率。", unsaved: "浏览器不允许本页面保存数据，关闭后对话会丢失。",
    keyTitle: "API 密钥", keyText: "此服务器需要密钥。密钥保留到关闭标签页为止。", keyWrong: "服务器拒绝了这个密钥。", ok: "确定", save: "保存",
  },
};

const NAMES = { en: "en", zh: "zh-Hans" };
let language = "en";

/** Text of a key in the page's language. */
export function t(key, values = {}) {
  return STRINGS[language][key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** A number as the page's language writes it. */
export function number(value, digits = 0) {
  return value.toLocaleString(NAMES[language], { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Choose "en", "zh" or null: the first of the browser's languages that the page has. Fills what index.html names. */
export function setLanguage(chosen) {
  const wanted = navigator.languages.map((one) => one.slice(0, 2).toLowerCase());
  language = chosen ?? wanted.find((one) => one in STRINGS) ?? "en";
  document.documentElement.lang = NAMES[language];
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = t(element.dataset.hint);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.matches("button")) element.title = t(element.dataset.label);
  }
}
