// <e2a-chat connect-url="…" token="…"> shows one session and talks to it. One classic script, no build step, no
// dependency; docs/how-to/embed-the-chat.md is its manual. Everything that comes over the socket is untrusted: it
// enters the page as text nodes and as elements made here, never as markup. Styles are constructable style sheets,
// which a Content-Security-Policy without 'unsafe-inline' allows.
(() => {
  "use strict";
  if (customElements.get("e2a-chat")) return;

  const PROMPT_BYTES = 256 * 1024; // the API's own limit
  const OUTPUT_CHARACTERS = 400_000; // kept on screen of one command; the rest is in the session's log
  const OUTPUT_RUNS = 4_000; // changes between stdout and stderr
  const JOURNAL_CHARACTERS = 4_000_000; // output of a running task kept for `restarted`, beyond what is on screen
  const CHUNK_CHARACTERS = 16_384; // a text node is copied whole when it grows, so it is kept this small
  const LIVE_MARKDOWN_CHARACTERS = 20_000; // an unfinished block is parsed again at every paint: it may not grow for ever
  const LONG_OUTPUT_LINES = 14;
  const PAINT_BUDGET_MS = 8;
  const AT_BOTTOM_PX = 48;

  const OPEN_LIMIT_MS = 15_000;
  const SILENCE_BEFORE_PING_MS = 20_000;
  const SILENCE_LIMIT_MS = 50_000;
  const SETTLED_MS = 5_000;
  const BACKOFF_BASE_MS = 400;
  const BACKOFF_LIMIT_MS = 20_000;
  const SLOW_DOWN_MS = 5_000;
  const RENEWALS_IN_A_ROW = 3;
  const GAPS_IN_A_ROW = 3;

  /** What each close code means to a person, and what to do about it. Codes not listed: reconnect. */
  const CLOSES = {
    1001: { then: "retry", words: "The server is restarting. Reconnecting…" },
    1009: { then: "too-large", words: "A message was larger than the server takes. Reconnecting…" },
    1012: { then: "retry", words: "The server is restarting. Reconnecting…" },
    4400: { then: "stop", words: "The server refused what this page sent (protocol error)." },
    4401: { then: "token", words: "The access token is no longer valid." },
    4403: { then: "stop", words: "This page is not allowed to open this session." },
    4404: { then: "stop", words: "There is no such session." },
    4408: { then: "retry", words: "The server did not get the access token in time. Reconnecting…" },
    4409: { then: "stop", words: "This session was opened somewhere else." },
    4410: { then: "ended", words: "This session has ended." },
    4413: { then: "too-large", words: "A message was larger than the server takes. Reconnecting…" },
    4429: { then: "slow", words: "Too many messages or connections. Waiting a moment before reconnecting…" },
  };

  const STATUS_WORDS = { starting: "Starting", idle: "Ready", running: "Working", waiting: "Waiting for an answer", ended: "Ended" };
  const STOP_WORDS = { cancelled: "last task stopped", error: "last task failed", max_turns: "turn limit reached", budget: "budget used up" };
  const END_WORDS = {
    finished: "finished", user: "by request", admin: "by an administrator", idle: "idle too long", ttl: "time is up", quota: "quota used up",
    disk: "disk full", oom: "out of memory", agent_exit: "the agent exited", image_error: "image error", host_restart: "the host restarted", lost: "sandbox lost",
  };
  const EXIT_WORDS = { 0: "Done", 124: "Timed out", 130: "Stopped", 137: "Out of memory" };

  // ---- Elements ----------------------------------------------------------------------------------------------

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  function copyButton(textOf) {
    const button = make("button", { type: "button", class: "copy" }, "Copy");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(textOf());
        button.textContent = "Copied";
      } catch {
        button.textContent = "Not allowed"; // no clipboard outside of a secure context, or refused by the reader
      }
      setTimeout(() => (button.textContent = "Copy"), 1600);
    });
    return button;
  }

  /** Text that only grows: many small text nodes, and a tail (the unfinished line) that may be rewritten. */
  class GrowingText {
    constructor(host) {
      this.host = host;
      this.chunks = [];
      this.tail = host.appendChild(new Text());
    }
    append(text) {
      for (let at = 0; at < text.length; at += CHUNK_CHARACTERS) {
        const piece = text.slice(at, at + CHUNK_CHARACTERS);
        const last = this.chunks.at(-1);
        if (last && last.length + piece.length <= CHUNK_CHARACTERS) {
          last.appendData(piece);
        } else {
          const chunk = new Text(piece);
          this.host.insertBefore(chunk, this.tail);
          this.chunks.push(chunk);
        }
      }
    }
    setTail(text) {
      if (this.tail.data !== text) this.tail.data = text;
    }
    /** Removes the oldest chunk; returns how many characters went (0: nothing left to remove). */
    dropOldest() {
      const chunk = this.chunks.shift();
      chunk?.remove();
      return chunk?.length ?? 0;
    }
  }

  // ---- Terminal output ------------------------------------------------------------------------------------------

  /** Removes escape sequences (ECMA-48: CSI, OSC, DCS …) and control characters, also when a sequence is split over pushes. */
  class EscapeFilter {
    state = "text";
    push(text) {
      if (this.state === "text" && !/[\x00-\x08\x0b-\x1f\x7f-\x9f]/.test(text)) return text;
      let out = "";
      for (const c of text) out += this.#take(c);
      return out;
    }
    #take(c) {
      const code = c.codePointAt(0);
      if (c === "\n" || code === 0x18 || code === 0x1a) {
        this.state = "text"; // a sequence that never ends must not swallow the output after it
        return c === "\n" ? c : "";
      }
      if (code === 0x1b) {
        this.state = this.state === "string" ? "string-escape" : "escape";
        return "";
      }
      switch (this.state) {
        case "escape":
          if (c === "[") this.state = "csi";
          else if ("]PX^_".includes(c)) this.state = "string";
          else if (code < 0x20 || code > 0x2f) this.state = "text";
          return "";
        case "csi":
          if (code >= 0x40) this.state = "text";
          return "";
        case "string":
          if (code === 0x07 || code === 0x9c) this.state = "text";
          return "";
        case "string-escape":
          this.state = c === "\\" ? "text" : "escape";
          return c === "\\" ? "" : this.#take(c);
      }
      if (code === 0x9b) this.state = "csi";
      else if ([0x90, 0x98, 0x9d, 0x9e, 0x9f].includes(code)) this.state = "string";
      else if (c === "\t" || c === "\r" || (code >= 0x20 && code < 0x7f) || code > 0x9f) return c;
      return "";
    }
  }

  /** A command's output: stdout and stderr in arrival order; a lone carriage return rewrites the line (progress bars). */
  class Output {
    constructor(label) {
      this.filters = { stdout: new EscapeFilter(), stderr: new EscapeFilter() };
      this.pre = make("pre", { part: "tool-output", tabindex: "0", role: "region", "aria-label": label });
      this.more = make("button", { type: "button", class: "more", hidden: true, "aria-expanded": "false", click: () => this.#toggle() });
      this.dropped = make("p", { class: "dropped", hidden: true });
      this.root = make("div", { class: "output", hidden: true }, this.dropped, this.pre, this.more);
      this.run = null;
      this.runs = [];
      this.length = this.lines = this.lost = 0;
      this.follows = true;
      this.pre.addEventListener("scroll", () => {
        this.follows = this.pre.scrollHeight - this.pre.scrollTop - this.pre.clientHeight < 24;
      });
    }
    write(data, stream) {
      const text = this.filters[stream].push(data);
      if (!text) return;
      if (this.run?.stream !== stream) {
        const span = this.pre.appendChild(make("span", { class: stream }));
        this.run = { stream, text: new GrowingText(span), line: "", returned: false };
        this.runs.push(this.run);
      }
      const run = this.run;
      let done = "";
      text.split("\n").forEach((part, index) => {
        if (index) {
          done += run.line + "\n";
          run.line = "";
          run.returned = false;
          this.lines += 1;
        }
        part.split("\r").forEach((piece, at) => {
          if (at) run.returned = true;
          if (!piece) return;
          run.line = run.returned ? piece : run.line + piece;
          run.returned = false;
        });
      });
      if (run.line.length > CHUNK_CHARACTERS) {
        done += run.line;
        run.line = "";
      }
      if (done) run.text.append(done);
      run.text.setTail(run.line);
      this.length += done.length;
      while (this.length > OUTPUT_CHARACTERS || this.runs.length > OUTPUT_RUNS) this.#drop();
    }
    #drop() {
      const gone = this.runs[0].text.dropOldest();
      if (!gone && this.runs.length > 1) this.runs.shift().text.host.remove();
      this.length -= gone;
      this.lost += gone;
      this.dropped.hidden = false;
      this.dropped.textContent = `${this.lost.toLocaleString()} earlier characters are not shown here.`;
    }
    #toggle() {
      const open = this.pre.classList.toggle("whole");
      this.more.setAttribute("aria-expanded", String(open));
      this.paint();
    }
    paint() {
      this.root.hidden = this.length === 0 && !this.run?.line;
      const open = this.pre.classList.contains("whole");
      this.more.hidden = this.lines <= LONG_OUTPUT_LINES && this.length < 2_000;
      this.more.textContent = open ? "Show less" : `Show all ${this.lines.toLocaleString()} lines`;
      if (this.follows && !open) this.pre.scrollTop = 1e9;
    }
  }

  // ---- Markdown: a small subset, built as nodes ------------------------------------------------------------------
  // Every loop below is linear in the text, or bounded: a hostile text may not freeze the page.

  function safeAddress(text) {
    try {
      const url = new URL(text);
      return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
    } catch {
      return null; // not an absolute address
    }
  }

  function link(href, ...children) {
    return make("a", { href, title: href, target: "_blank", rel: "noopener nofollow ugc", referrerpolicy: "no-referrer" }, ...children);
  }

  function isSpace(c) {
    return c === undefined || /\s/.test(c);
  }

  function isPunctuation(c) {
    return c !== undefined && /[\p{P}\p{S}]/u.test(c);
  }

  /** For each "[" the index of its "]". */
  function matchBrackets(text) {
    const open = [];
    const pairs = new Map();
    for (let at = 0; at < text.length; at++) {
      if (text[at] === "\\") at++;
      else if (text[at] === "[") open.push(at);
      else if (text[at] === "]" && open.length) pairs.set(open.pop(), at);
    }
    return pairs;
  }

  /** For each run of backticks the index of the next run of the same length. */
  function matchTicks(text) {
    const waiting = new Map();
    const pairs = new Map();
    for (const { 0: run, index } of text.matchAll(/`+/g)) {
      if (waiting.has(run.length)) pairs.set(waiting.get(run.length), index);
      waiting.set(run.length, index);
    }
    return pairs;
  }

  const DESTINATION = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/;

  function inline(text, links = true) {
    const brackets = matchBrackets(text);
    const ticks = matchTicks(text);
    const frames = [{ marker: "", nodes: [] }];
    const special = /[\\`*_~[!<\n]|https?:\/\//g;
    let plain = "";
    const flush = () => {
      if (plain) frames.at(-1).nodes.push(plain);
      plain = "";
    };
    const add = (node) => {
      flush();
      frames.at(-1).nodes.push(node);
    };
    const unwind = (depth) => {
      flush();
      while (frames.length > depth) {
        const { marker, nodes } = frames.pop();
        frames.at(-1).nodes.push(marker, ...nodes);
      }
    };
    const delimiter = (c, at, count) => {
      const before = text[at - 1];
      const after = text[at + count];
      const left = !isSpace(after) && (!isPunctuation(after) || isSpace(before) || isPunctuation(before));
      const right = !isSpace(before) && (!isPunctuation(before) || isSpace(after) || isPunctuation(after));
      const opens = c === "_" ? left && (!right || isPunctuation(before)) : left;
      const closes = c === "_" ? right && (!left || isPunctuation(after)) : right;
      while (closes && count) {
        const depth = frames.findLastIndex(({ marker }) => marker[0] === c && marker.length <= count);
        if (depth < 1) break;
        unwind(depth + 1);
        const { marker, nodes } = frames.pop();
        add(make(c === "~" ? "s" : marker.length === 2 ? "strong" : "em", null, ...nodes));
        count -= marker.length;
      }
      while (opens && count && frames.length < 24) {
        const size = count >= 2 ? 2 : 1;
        flush();
        frames.push({ marker: c.repeat(size), nodes: [] });
        count -= size;
      }
      plain += c.repeat(count);
    };

    let at = 0;
    while (at < text.length) {
      special.lastIndex = at;
      const found = special.exec(text);
      if (!found) break;
      plain += text.slice(at, found.index);
      at = found.index;
      const c = text[at];
      if (c === "\\") {
        if (text[at + 1] === "\n") add(make("br"));
        else if (/[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) plain += text[at + 1];
        else plain += text.slice(at, at + 2);
        at += 2;
      } else if (c === "\n") {
        if (plain.endsWith("  ")) add(make("br"));
        else plain += "\n";
        at += 1;
      } else if (c === "`") {
        const size = /^`+/.exec(text.slice(at, at + 64))[0].length;
        const end = ticks.get(at);
        if (end === undefined) {
          plain += "`".repeat(size);
          at += size;
        } else {
          const code = text.slice(at + size, end).replaceAll("\n", " ");
          add(make("code", null, /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code));
          at = end + size;
        }
      } else if (c === "*" || c === "_" || c === "~") {
        let count = 1;
        while (text[at + count] === c) count += 1;
        if (c === "~" ? count === 2 : count <= 3) delimiter(c, at, count);
        else plain += c.repeat(count);
        at += count;
      } else if (c === "[" || (c === "!" && text[at + 1] === "[")) {
        const open = c === "!" ? at + 1 : at;
        const close = brackets.get(open);
        const target = close !== undefined && links && text[close + 1] === "(" ? DESTINATION.exec(text.slice(close + 1, close + 2_100)) : null;
        const href = target && safeAddress(target[1] ?? target[2]);
        if (href) {
          // An image is a link too: loading it would tell its server that somebody reads this.
          const label = text.slice(open + 1, close);
          add(c === "!" ? link(href, label || href) : link(href, ...(label ? inline(label, false) : [href])));
          at = close + 1 + target[0].length;
        } else {
          plain += text.slice(at, open + 1);
          at = open + 1;
        }
      } else if (c === "<") {
        const auto = links ? /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/.exec(text.slice(at, at + 2_010)) : null;
        const href = auto && safeAddress(auto[1]);
        if (href) add(link(href, auto[1]));
        else plain += "<";
        at += href ? auto[0].length : 1;
      } else if (c === "h") {
        let address = /^https?:\/\/[^\s<>"'`*[\]]*/.exec(text.slice(at, at + 2_000))[0];
        while (/[.,;:!?_~]$/.test(address) || (address.endsWith(")") && !address.includes("("))) address = address.slice(0, -1);
        const href = links ? safeAddress(address) : null;
        if (href) add(link(href, address));
        else plain += address;
        at += address.length || 1;
      } else {
        plain += c;
        at += 1;
      }
    }
    plain += text.slice(at);
    unwind(1);
    return frames[0].nodes;
  }

  const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
  const HEADING = /^ {0,3}(#{1,6})[ \t]+(\S.*)$/;
  const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
  const QUOTE = /^ {0,3}> ?/;
  const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}(?! )| *$| )/;
  const NESTING_LIMIT = 8;

  function closesFence(line, marker) {
    const text = line.trim();
    return text.length >= marker.length && /^(`+|~+)$/.test(text) && text[0] === marker[0];
  }

  function cellsOf(line) {
    return line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
  }

  function startsTable(lines, at) {
    if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return false;
    const rule = cellsOf(lines[at + 1]);
    return rule.length === cellsOf(lines[at]).length && rule.every((cell) => /^:?-+:?$/.test(cell));
  }

  function startsBlock(line) {
    return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
  }

  function kindOfItem(match) {
    return match[2].at(-1);
  }

  /** Splits lines into top-level blocks `{kind, from, to, …}` (`to` exclusive). Only the last can still change. */
  function parseBlocks(lines) {
    const blocks = [];
    let at = 0;
    while (at < lines.length) {
      const line = lines[at];
      let match;
      let to = at + 1;
      if (!line.trim()) {
        at = to;
        continue;
      }
      if ((match = FENCE.exec(line))) {
        const [, indent, marker, info] = match;
        while (to < lines.length && !closesFence(lines[to], marker)) to += 1;
        const closed = to < lines.length;
        const text = lines.slice(at + 1, to).map((l) => (l.startsWith(indent) ? l.slice(indent.length) : l.trimStart()));
        to = closed ? to + 1 : to;
        blocks.push({ kind: "fence", from: at, to, marker, indent, closed, language: info.trim().split(/\s/)[0].slice(0, 40), text });
      } else if (RULE.test(line)) {
        blocks.push({ kind: "rule", from: at, to });
      } else if ((match = HEADING.exec(line))) {
        blocks.push({ kind: "heading", from: at, to, level: match[1].length, text: match[2].trimEnd() });
      } else if (QUOTE.test(line)) {
        while (to < lines.length && QUOTE.test(lines[to])) to += 1;
        blocks.push({ kind: "quote", from: at, to, lines: lines.slice(at, to).map((l) => l.replace(QUOTE, "")) });
      } else if ((match = ITEM.exec(line))) {
        const block = parseList(lines, at, match);
        blocks.push(block);
        to = block.to;
      } else if (startsTable(lines, at)) {
        to = at + 2;
        while (to < lines.length && lines[to].trim() && lines[to].includes("|")) to += 1;
        blocks.push({ kind: "table", from: at, to, head: cellsOf(line), rows: lines.slice(at + 2, to).map(cellsOf) });
      } else {
        while (to < lines.length && lines[to].trim() && !startsBlock(lines[to]) && !startsTable(lines, to)) to += 1;
        blocks.push({ kind: "paragraph", from: at, to, text: lines.slice(at, to).map((l) => l.trimStart()).join("\n") });
      }
      at = to;
    }
    return blocks;
  }

  function parseList(lines, from, first) {
    const kind = kindOfItem(first);
    // Models indent nested lists by two spaces, whatever the width of the marker above: that is taken as nested.
    const isNested = (line) => line.length - line.trimStart().length >= first[1].length + 2;
    const items = [];
    let offset = 0;
    let to = from;
    while (to < lines.length) {
      const line = lines[to];
      if (!line.trim()) {
        let next = to + 1;
        while (next < lines.length && !lines[next].trim()) next += 1;
        const item = next < lines.length ? ITEM.exec(lines[next]) : null;
        if (next === lines.length || !(isNested(lines[next]) || (item && kindOfItem(item) === kind))) break;
        items.at(-1).push(...lines.slice(to, next));
        to = next;
        continue;
      }
      const item = ITEM.exec(line);
      const nested = to > from && isNested(line);
      if (item && !nested) {
        if (kindOfItem(item) !== kind || RULE.test(line)) break;
        offset = item[0].length;
        items.push([line.slice(offset)]);
      } else if (nested) {
        const indent = line.length - line.trimStart().length;
        items.at(-1).push(line.slice(Math.min(indent, offset)));
      } else if (startsBlock(line)) {
        break;
      } else {
        items.at(-1).push(line);
      }
      to += 1;
    }
    const ordered = /\d/.test(first[2]);
    return { kind: "list", from, to, ordered, start: ordered ? Number.parseInt(first[2], 10) : 1, items };
  }

  function codeFigure(language) {
    const code = make("code");
    const text = new GrowingText(code);
    const figure = make(
      "figure",
      { class: "code", part: "code" },
      make("figcaption", null, make("span", null, language || "text"), copyButton(() => code.textContent)),
      make("pre", { tabindex: "0" }, code),
    );
    return { figure, text };
  }

  function buildBlock(block, depth = 0) {
    switch (block.kind) {
      case "fence": {
        const { figure, text } = codeFigure(block.language);
        text.append(block.text.map((line) => line + "\n").join(""));
        return figure;
      }
      case "rule":
        return make("hr");
      case "heading":
        return make(`h${Math.min(6, block.level + 2)}`, null, ...inline(block.text));
      case "quote":
        return make("blockquote", null, ...buildAll(block.lines, depth));
      case "list": {
        const list = make(block.ordered ? "ol" : "ul", { start: block.start === 1 ? null : String(block.start) });
        for (const lines of block.items) {
          const children = buildAll(lines, depth);
          if (children.filter((child) => child.tagName === "P").length === 1 && children[0].tagName === "P") {
            children.splice(0, 1, ...children[0].childNodes);
          }
          list.append(make("li", null, ...children));
        }
        return list;
      }
      case "table": {
        const row = (cells, tag) => make("tr", null, ...block.head.map((_, index) => make(tag, null, ...inline(cells[index] ?? ""))));
        const table = make("table", null, make("thead", null, row(block.head, "th")), make("tbody", null, ...block.rows.map((cells) => row(cells, "td"))));
        return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
      }
      default:
        return make("p", null, ...inline(block.text.trimEnd()));
    }
  }

  function buildAll(lines, depth) {
    if (depth >= NESTING_LIMIT) return [make("p", null, lines.join("\n"))];
    return parseBlocks(lines).map((block) => buildBlock(block, depth + 1));
  }

  /** Markdown that arrives in pieces: finished blocks stay as they are, only the last one is built again. */
  class MarkdownStream {
    constructor() {
      this.root = make("div", { class: "markdown", part: "assistant" });
      this.filter = new EscapeFilter();
      this.source = "";
      this.live = null;
      this.fence = null;
      this.changed = false;
    }
    write(data) {
      this.source += this.filter.push(data).replaceAll("\r", "");
      this.changed = true;
    }
    paint() {
      if (!this.changed) return;
      this.changed = false;
      if (this.fence && !this.#continueFence()) return;
      const lines = this.source.split("\n");
      const blocks = parseBlocks(lines);
      this.live?.remove();
      this.live = null;
      const last = blocks.pop();
      for (const block of blocks) this.root.append(buildBlock(block));
      if (!last) return;
      if (last.kind === "fence" && !last.closed && lines.length > last.from + 1) {
        const { figure, text } = codeFigure(last.language);
        this.root.append(figure);
        this.fence = { marker: last.marker, indent: last.indent, text };
        this.source = lines.slice(last.from + 1).join("\n");
        this.#continueFence();
        return;
      }
      this.live = buildBlock(last);
      this.root.append(this.live);
      this.source = lines.slice(last.from).join("\n");
      if (this.source.length > LIVE_MARKDOWN_CHARACTERS) {
        this.source = "";
        this.live = null;
      }
    }
    /** Writes whole lines into the open fence; true when it was closed and text is left to parse. */
    #continueFence() {
      const { marker, indent, text } = this.fence;
      let from = 0;
      let end;
      let done = "";
      let closed = false;
      while (!closed && (end = this.source.indexOf("\n", from)) >= 0) {
        const line = this.source.slice(from, end);
        closed = closesFence(line, marker);
        if (!closed) done += (line.startsWith(indent) ? line.slice(indent.length) : line) + "\n";
        from = end + 1;
      }
      this.source = this.source.slice(from);
      text.append(done);
      const mayClose = closesFence(this.source, marker) || marker.startsWith(this.source.trim());
      text.setTail(closed || mayClose ? "" : this.source);
      if (closed) this.fence = null;
      return closed && this.source !== "";
    }
  }

  // ---- One task: the prompt and all that came of it ----------------------------------------------------------------

  function note(tone, ...children) {
    return make("div", { class: `note ${tone}`, part: "notice" }, ...children);
  }

  function describeInput(input) {
    if (typeof input === "string") return { title: input, rest: [] };
    const entries = Object.entries(input && typeof input === "object" ? input : {});
    const text = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
    const short = entries.filter(([key, value]) => ["command", "path", "url", "query", "pattern"].includes(key) && typeof value === "string");
    const title = short.map(([, value]) => value).join(" ");
    return { title, rest: entries.filter((entry) => !short.includes(entry)).map(([key, value]) => [key, text(value)]) };
  }

  class ToolCall {
    constructor(frame) {
      const { title, rest } = describeInput(frame.input);
      this.output = new Output(`Output of ${frame.name}`);
      this.badge = make("span", { class: "exit busy" }, "running");
      const details = make(
        "details",
        { open: true },
        make("summary", null, make("span", { class: "tool-name" }, String(frame.name ?? "tool")), make("code", null, title.split("\n", 1)[0].slice(0, 400)), this.badge),
      );
      if (title.includes("\n") || title.length > 400) details.append(make("pre", { class: "input", tabindex: "0" }, title));
      for (const [key, value] of rest) details.append(make("p", { class: "input-name" }, key), make("pre", { class: "input", tabindex: "0" }, value));
      details.append(this.output.root);
      this.root = make("section", { class: "tool", part: "tool" }, details);
    }
    write(data, stream) {
      this.output.write(data, stream);
    }
    paint() {
      this.output.paint();
    }
    finish({ is_error: failed, exit_code: code, truncated }) {
      this.finished = true;
      const good = code === undefined || code === null ? !failed : code === 0;
      this.badge.className = `exit ${good ? "good" : "bad"}`;
      this.badge.textContent = (code ?? null) === null ? (failed ? "failed" : "done") : `exit ${code}`;
      if (truncated) this.badge.append(" · cut");
    }
  }

  class RawOutput {
    constructor() {
      this.output = new Output("Output");
      this.root = make("section", { class: "tool raw", part: "tool" }, this.output.root);
    }
    write(data, stream) {
      this.output.write(data, stream);
    }
    paint() {
      this.output.paint();
    }
  }

  class Task {
    constructor(chat, prompt = null) {
      this.chat = chat;
      this.id = null;
      this.state = "queued";
      this.journal = []; // kept until the exit, for `restarted`
      this.journalLength = 0;
      this.promptText = make("div", { class: "prompt-text" });
      this.hint = make("p", { class: "hint" });
      this.prompt = make("div", { class: "prompt", part: "prompt", hidden: true }, make("span", { class: "hidden-label" }, "You: "), this.promptText, this.hint);
      this.body = make("div", { class: "body", part: "answer" });
      this.foot = make("p", { class: "foot", hidden: true });
      this.root = make("article", { class: "task", part: "task" }, this.prompt, this.body, this.foot);
      this.#reset();
      if (prompt !== null) this.setPrompt(prompt);
    }
    #reset() {
      this.body.replaceChildren();
      this.segment = null;
      this.tools = new Map();
      this.openTool = null;
    }
    setPrompt(text) {
      this.promptText.textContent = text;
      this.prompt.hidden = false;
    }
    setHint(...children) {
      this.hint.replaceChildren(...children);
    }
    apply(frame) {
      if (typeof frame.seq === "number" && this.state !== "done") this.#record(frame);
      this.#show(frame);
    }
    #record(frame) {
      this.journal.push(frame);
      this.journalLength += frame.data?.length ?? 0;
      if (this.journalLength < JOURNAL_CHARACTERS) return;
      const half = this.journal.length >> 1;
      this.journal = this.journal.filter(({ source }, index) => index >= half || source !== "tool");
      this.journalLength = this.journal.reduce((sum, { data }) => sum + (data?.length ?? 0), 0);
    }
    #show(frame) {
      switch (frame.type) {
        case "task_queued":
          if (typeof frame.prompt === "string") this.setPrompt(frame.prompt);
          if (this.state === "queued") this.setHint("Queued");
          break;
        case "task_started":
          if (typeof frame.prompt === "string") this.setPrompt(frame.prompt);
          this.state = "running";
          this.startedAt = Date.parse(frame.ts);
          this.setHint();
          break;
        case "stdout":
        case "stderr":
          this.#write(frame);
          break;
        case "tool_use":
          this.#place((this.openTool = new ToolCall(frame)));
          this.tools.set(frame.tool_use_id, this.openTool);
          break;
        case "tool_result":
          this.tools.get(frame.tool_use_id)?.finish(frame);
          if (this.openTool?.finished) this.openTool = null;
          break;
        case "approval_requested":
          this.#askApproval(frame);
          break;
        case "error":
          this.add(errorNote(frame));
          break;
        case "exit":
          this.#finish(frame);
          break;
      }
    }
    add(element) {
      this.segment = null;
      this.body.append(element);
    }
    #place(segment) {
      this.segment = segment;
      this.body.append(segment.root);
      this.chat.dirty.add(segment);
    }
    #write({ type, source, data, tool_use_id: toolId }) {
      let target = this.segment;
      if (source === "assistant" && type === "stdout") {
        if (!(target instanceof MarkdownStream)) this.#place((target = new MarkdownStream()));
      } else {
        target = this.tools.get(toolId) ?? this.openTool ?? target;
        if (!(target instanceof ToolCall || target instanceof RawOutput)) this.#place((target = new RawOutput()));
      }
      target.write(String(data ?? ""), type);
      this.chat.dirty.add(target);
    }
    #askApproval({ approval_id: id, tool_use_id: toolId }) {
      const answer = (decision) => {
        if (this.chat.sendFrame({ type: "approval", approval_id: id, decision })) box.replaceChildren(decision === "allow" ? "Allowed." : "Denied.");
      };
      const box = note(
        "warn",
        make("p", null, `The agent asks before it runs ${this.tools.has(toolId) ? "the tool above" : "a tool"}.`),
        make("button", { type: "button", class: "main", click: () => answer("allow") }, "Allow"),
        " ",
        make("button", { type: "button", click: () => answer("deny") }, "Deny"),
      );
      this.add(box);
    }
    #finish(frame) {
      this.state = "done";
      this.journal = [];
      for (const tool of this.tools.values()) if (!tool.finished) tool.finish({ is_error: frame.exit_code !== 0 });
      this.segment = this.openTool = null;
      const seconds = (Date.parse(frame.ts) - this.startedAt) / 1000;
      const words = EXIT_WORDS[frame.exit_code] ?? `Failed (exit ${frame.exit_code})`;
      const parts = [words, frame.signal, frame.reason, seconds >= 0 ? duration(seconds) : null];
      this.setHint();
      this.foot.hidden = false;
      this.foot.className = `foot ${frame.exit_code === 0 ? "good" : frame.exit_code === 130 ? "" : "bad"}`;
      this.foot.textContent = parts.filter((part) => typeof part === "string" && part).join(" · ");
      this.root.classList.add("finished");
    }
    /** A worker died: what this task wrote after `after` is void. */
    restart(after) {
      this.journal = this.journal.filter(({ seq }) => seq <= after);
      this.#reset();
      for (const frame of this.journal) this.#show(frame);
      this.add(note("quiet", "The worker was replaced; the task goes on from here."));
    }
  }

  function duration(seconds) {
    if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
    return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  }

  function errorNote({ code, detail, retry }) {
    const again = retry === "retrying";
    return note(again ? "warn" : "bad", make("p", null, make("code", null, String(code ?? "error")), " ", String(detail ?? "")), again ? make("p", { class: "small" }, "Trying again…") : "");
  }

  // ---- The stream: one session's socket, its cursor and its reconnects -----------------------------------------------

  class SessionStream {
    /** `events`: frame(frame), state({connection, code, words}), needsToken(reason) → Promise<string> or null, tooLarge(). */
    constructor({ url, token, after, events }) {
      this.url = url;
      this.token = token;
      this.after = after; // null: start live
      this.events = events;
      this.connection = "idle";
      this.failures = this.renewals = this.gaps = 0;
      this.wake = () => {
        if (this.connection === "waiting" && !document.hidden) this.open();
      };
      addEventListener("online", this.wake);
      document.addEventListener("visibilitychange", this.wake);
    }
    open() {
      this.#drop();
      if (!this.token) return this.#renew("missing");
      let socket;
      try {
        const address = new URL(this.url, document.baseURI);
        address.protocol = address.protocol.replace(/^http/, "ws");
        address.searchParams.set("token", this.token);
        if (this.after !== null) address.searchParams.set("after", String(this.after));
        socket = new WebSocket(address);
      } catch {
        return this.#set("stopped", null, "The address of the session is not valid.");
      }
      this.socket = socket;
      this.usedToken = this.token;
      this.progress = false;
      this.accepts = null;
      this.retryAfter = 0;
      this.heardAt = Date.now();
      this.#set("connecting", null, this.failures ? "Reconnecting…" : "");
      const mine = (handler) => (event) => this.socket === socket && handler(event);
      socket.addEventListener("message", mine(({ data }) => this.#receive(data)));
      socket.addEventListener("close", mine(({ code }) => this.#closed(code)));
      this.watch = setInterval(() => this.#watch(), 5_000);
    }
    /** Ends it for good. */
    close() {
      this.#drop();
      removeEventListener("online", this.wake);
      document.removeEventListener("visibilitychange", this.wake);
      this.connection = "idle";
    }
    send(frame) {
      if (this.connection !== "live" || this.socket?.readyState !== WebSocket.OPEN) return false;
      this.socket.send(JSON.stringify(frame));
      return true;
    }
    useToken(token) {
      this.token = token;
      this.renewals = 0;
      if (token && ["token", "stopped"].includes(this.connection)) this.open();
    }
    #set(connection, code, words) {
      this.connection = connection;
      this.code = code;
      this.events.state({ connection, code, words });
    }
    #drop() {
      clearTimeout(this.timer);
      clearTimeout(this.settled);
      clearInterval(this.watch);
      const socket = this.socket;
      this.socket = null; // its handlers are deaf from here
      socket?.close();
    }
    /** Browsers show neither pings nor half-open connections: ask, and give up on silence. */
    #watch() {
      const silence = Date.now() - this.heardAt;
      const opening = this.connection === "connecting";
      if (silence > (opening ? OPEN_LIMIT_MS : SILENCE_LIMIT_MS)) this.#closed(1006);
      else if (silence > SILENCE_BEFORE_PING_MS && this.socket.readyState === WebSocket.OPEN) this.socket.send('{"type":"ping"}');
    }
    #receive(data) {
      this.heardAt = Date.now();
      let frame;
      try {
        frame = JSON.parse(data);
      } catch {
        return; // not ours: the contract knows only JSON objects
      }
      if (!frame || typeof frame !== "object" || typeof frame.type !== "string") return;
      if (typeof frame.seq === "number" && frame.type !== "ready" && frame.type !== "caught_up") return this.#stored(frame);
      switch (frame.type) {
        case "ready":
          this.renewals = 0;
          if (this.after === null) this.after = frame.seq ?? 0;
          else if (frame.seq !== this.after) this.#set("replaying", null, "");
          this.events.frame(frame);
          if (frame.seq === this.after) this.#live();
          return;
        case "caught_up":
          if (frame.seq > this.after && this.#gap()) return;
          this.events.frame(frame);
          return this.#live();
        case "resync":
          this.#resync(frame);
          break;
        case "error":
          this.retryAfter = Number(frame.retry_after_ms) || 0;
          break;
        case "pong":
          return;
      }
      this.events.frame(frame);
    }
    #stored(frame) {
      const { seq } = frame;
      if (this.after === null) this.after = seq - 1; // live, and the server sent no `ready` that told where the log stands
      if (seq <= this.after) return; // a duplicate
      if (seq > this.after + 1 && !this.accepts?.(seq) && this.#gap()) return;
      this.accepts = null;
      this.gaps = 0;
      this.after = seq;
      if (!this.progress) {
        this.progress = true;
        this.failures = 0;
      }
      this.events.frame(frame);
    }
    /** Frames are missing: fetch them by reconnecting with the cursor. False after some tries: go on without them. */
    #gap() {
      this.gaps += 1;
      if (this.gaps > GAPS_IN_A_ROW) return false;
      this.#retry(null, "Some frames are missing. Fetching them…");
      return true;
    }
    #resync({ from, head }) {
      if (typeof from !== "number") return;
      if (typeof head === "number" && head < this.after) this.events.restartLog();
      this.after = Math.max(0, from - 1);
      this.accepts = (seq) => seq === from + 1; // a server may mean `from` as a cursor
    }
    #live() {
      if (this.connection === "live") return;
      this.settled = setTimeout(() => (this.failures = this.gaps = 0), SETTLED_MS);
      this.#set("live", null, "");
    }
    #closed(code) {
      const { then = "retry", words = "Connection lost. Reconnecting…" } = CLOSES[code] ?? {};
      switch (then) {
        case "stop":
          this.#drop();
          return this.#set("stopped", code, words);
        case "ended":
          this.#drop();
          return this.#set("ended", code, words);
        case "token":
          return this.#renew("expired");
        case "too-large":
          this.events.tooLarge();
          return this.#retry(code, words);
        case "slow":
          return this.#retry(code, words, Math.max(SLOW_DOWN_MS, this.retryAfter));
        default:
          return this.#retry(code, words, this.retryAfter);
      }
    }
    #retry(code, words, least = 0) {
      this.#drop();
      const limit = Math.min(BACKOFF_LIMIT_MS, BACKOFF_BASE_MS * 2 ** Math.min(this.failures, 8));
      this.failures += 1;
      // Full jitter when the server restarts: all its clients come back at once.
      const jitter = code === 1012 || code === 1001 ? Math.random() * Math.max(limit, 1_500) : limit * (0.5 + Math.random() / 2);
      this.timer = setTimeout(() => this.open(), least + jitter);
      this.#set("waiting", code, words);
    }
    async #renew(reason) {
      const { words } = CLOSES[4401];
      if (reason === "expired" && this.token !== this.usedToken) return this.#retry(4401, words); // it was renewed meanwhile
      this.#drop();
      this.renewals += 1;
      const before = this.token;
      const waiting = (this.renewal = this.renewals <= RENEWALS_IN_A_ROW ? this.events.needsToken(reason) : null);
      if (this.token && this.token !== before) return this.#retry(4401, words); // the handler has set the property
      this.#set("token", reason === "expired" ? 4401 : null, reason === "expired" ? `${words}${waiting ? " Renewing it…" : ""}` : "Waiting for an access token.");
      if (!waiting) return;
      try {
        const token = await waiting;
        if (this.renewal !== waiting || this.connection !== "token") return; // overtaken by a new attribute, or closed
        if (typeof token !== "string" || !token) throw new TypeError("e2a-token-needed was answered without a token");
        this.token = token;
        if (this.renewals > 1) this.#retry(4401, words);
        else this.open();
      } catch (error) {
        console.warn("e2a-chat: the token could not be renewed", error);
        if (this.connection === "token") this.#set("token", 4401, `${words} It could not be renewed.`);
      }
    }
  }

  // ---- The element -----------------------------------------------------------------------------------------------

  function newId() {
    if (crypto.randomUUID) return crypto.randomUUID();
    const bytes = crypto.getRandomValues(new Uint8Array(16)); // no randomUUID outside of a secure context
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  class E2AChat extends HTMLElement {
    static observedAttributes = ["connect-url", "token", "placeholder", "read-only"];

    #token = "";
    #stream = null;
    #tasks = new Map();
    #pending = new Map();
    #queue = [];
    #scheduled = false;
    #follows = true;
    #session = { status: "", stopReason: null, endReason: null };
    #link = { connection: "idle", code: null, words: "" };
    #usage = { tokens: 0, cost: 0 };
    #view;
    dirty = new Set();

    constructor() {
      super();
      const root = this.attachShadow({ mode: "open" });
      root.adoptedStyleSheets = [SHEET];
      this.#view = this.#build();
      root.append(...this.#view.top);
    }

    // -- What a page uses --

    get connectUrl() {
      return this.getAttribute("connect-url") ?? "";
    }
    set connectUrl(value) {
      this.setAttribute("connect-url", value);
    }
    /** Set as a property, the token does not show up in the document. */
    get token() {
      return this.#token;
    }
    set token(value) {
      const token = value ?? "";
      if (token === this.#token) return;
      this.#token = token;
      if (this.#stream) this.#stream.useToken(token);
      else this.#start();
    }
    get theme() {
      return this.getAttribute("theme") ?? "";
    }
    set theme(value) {
      this.setAttribute("theme", value);
    }
    get liveOnly() {
      return this.hasAttribute("live-only");
    }
    set liveOnly(value) {
      this.toggleAttribute("live-only", Boolean(value));
    }
    get readOnly() {
      return this.hasAttribute("read-only");
    }
    set readOnly(value) {
      this.toggleAttribute("read-only", Boolean(value));
    }
    get placeholder() {
      return this.getAttribute("placeholder") ?? "";
    }
    set placeholder(value) {
      this.setAttribute("placeholder", value);
    }
    /** `{connection, code, words, status, stopReason, endReason, lastSeq}`, as in the event `e2a-status`. */
    get status() {
      return { ...this.#link, ...this.#session, lastSeq: this.#stream?.after ?? 0 };
    }

    /** Sends a task, now or when connected; returns the id under which the server takes it only once. */
    sendTask(prompt) {
      const id = newId();
      const task = new Task(this, prompt);
      this.#pending.set(id, { id, prompt, task, state: "waiting", tried: false });
      this.#append(task.root);
      this.#follows = true;
      this.#flushPending();
      this.#schedule();
      return id;
    }
    /** Stops the running task (or the one named); false when not connected. */
    cancel(taskId) {
      const task = taskId ? this.#tasks.get(taskId) : this.#runningTask();
      const sent = this.sendFrame(task?.id ? { type: "cancel", task_id: task.id } : { type: "cancel" });
      if (sent) task?.setHint("Stopping…");
      return sent;
    }
    /** Sends any frame of the contract (`tool_result`, `stdin` …); false when not connected. */
    sendFrame(frame) {
      return this.#stream?.send(frame) ?? false;
    }
    focus(options) {
      this.#view.input.focus(options);
    }
    reconnect() {
      if (this.#stream) this.#stream.open();
      else this.#start();
    }

    // -- Life --

    connectedCallback() {
      this.#connected = true;
      for (const name of ["token", "connectUrl", "theme", "liveOnly", "readOnly", "placeholder"]) {
        if (!Object.hasOwn(this, name)) continue;
        const value = this[name]; // set before this script was loaded
        delete this[name];
        this[name] = value;
      }
      this.#start();
      this.#resizes.observe(this.#view.log);
    }
    disconnectedCallback() {
      this.#connected = false;
      this.#resumeAt = this.#stream?.after ?? this.#resumeAt;
      this.#stream?.close();
      this.#stream = null;
      this.#resizes.disconnect();
    }
    attributeChangedCallback(name, before, after) {
      if (name === "token") {
        this.token = after;
      } else if (name === "connect-url" && before !== after) {
        this.#stream?.close();
        this.#stream = null;
        this.#resumeAt = null;
        this.#pending.clear();
        this.#clear();
        this.#start();
      } else {
        this.#showState();
      }
    }
    #connected = false;
    #resumeAt = null; // where to go on after the element was moved in the page
    #resizes = new ResizeObserver(() => this.#follows && this.#scrollDown());

    #start() {
      if (!this.#connected || !this.connectUrl || this.#stream) return;
      const stream = (this.#stream = new SessionStream({
        url: this.connectUrl,
        token: this.#token,
        after: this.#resumeAt ?? (this.liveOnly ? null : 0),
        events: {
          frame: (frame) => this.#receive(frame),
          state: (link) => this.#linkChanged(link),
          needsToken: (reason) => this.#askForToken(reason),
          tooLarge: () => this.#refuse([...this.#pending.values()].findLast(({ state }) => state === "sent"), "It is larger than the server takes."),
          restartLog: () => this.#clear(),
        },
      }));
      // Not at once: a page that sets connectUrl and then token should not be asked for a token in between.
      queueMicrotask(() => {
        if (stream === this.#stream && stream.connection === "idle") stream.open();
      });
    }
    #emit(name, detail) {
      this.dispatchEvent(new CustomEvent(name, { detail, bubbles: true, composed: true }));
    }
    #askForToken(reason) {
      let answer = null;
      const event = new CustomEvent("e2a-token-needed", { detail: { reason }, bubbles: true, composed: true });
      event.respondWith = (promise) => {
        answer = Promise.resolve(promise);
      };
      this.dispatchEvent(event);
      return answer;
    }

    // -- Frames --

    #receive(frame) {
      if (frame.type === "task_queued" || frame.type === "task_started") this.#acknowledge(frame);
      if (frame.type === "error" && typeof frame.seq !== "number") this.#blame(frame);
      if (frame.type === "ready") this.#opened(frame);
      if (frame.type === "status") this.#statusChanged(frame);
      this.#queue.push(frame);
      this.#schedule();
      this.#emit("e2a-frame", frame);
    }
    #opened({ session }) {
      if (!session || typeof session !== "object") return;
      this.#statusChanged(session);
      if (session.agent?.kind !== "shell") return;
      this.#view.log.dataset.agent = "shell";
      if (!this.hasAttribute("placeholder")) this.#view.input.placeholder = "Command…";
    }
    #statusChanged({ status, stop_reason: stopReason = null, end_reason: endReason = null }) {
      if (typeof status !== "string") return;
      this.#session = { status, stopReason, endReason };
      this.#view.expiring.hidden = true;
      this.#showState();
      this.#emit("e2a-status", this.status);
    }
    /** Finds the task of ours that the server has taken: by the id that it echoes, else by its prompt. */
    #acknowledge(frame) {
      if (this.#tasks.has(frame.task_id)) return;
      const sent = [...this.#pending.values()].filter(({ tried }) => tried); // perhaps on an earlier socket
      const names = [frame.id, frame.client_id, frame.task_id];
      const mine = sent.find(({ id }) => names.includes(id)) ?? sent.find(({ prompt, state }) => prompt === frame.prompt && state !== "refused");
      if (!mine) return;
      this.#pending.delete(mine.id);
      mine.task.root.classList.remove("refused");
      mine.task.id = frame.task_id;
      this.#tasks.set(frame.task_id, mine.task);
    }
    /** An error without seq is about a frame of ours: a task that was not taken, unless it names something else. */
    #blame({ id, code, detail }) {
      const sent = [...this.#pending.values()].filter(({ state }) => state === "sent");
      const named = sent.find((entry) => entry.id === id);
      if (named || id === undefined) this.#refuse(named ?? sent[0], String(detail ?? code ?? ""));
    }
    #refuse(entry, reason) {
      if (!entry) return;
      entry.state = "refused"; // kept: an error that names no frame may have been about another one
      entry.task.root.classList.add("refused");
      const again = () => {
        this.#pending.delete(entry.id);
        entry.task.root.remove();
        this.sendTask(entry.prompt);
      };
      entry.task.setHint(`Not sent: ${reason} `, make("button", { type: "button", class: "inline", click: again }, "Send again"));
    }
    /** Sends what waits, in order. What was sent but not acknowledged goes again after a reconnect: its id makes that safe. */
    #flushPending() {
      for (const entry of this.#pending.values()) {
        if (entry.state === "waiting" && this.sendFrame({ type: "task", id: entry.id, prompt: entry.prompt })) {
          entry.state = "sent";
          entry.tried = true;
        }
        if (entry.state !== "refused") entry.task.setHint(entry.state === "sent" ? "Sending…" : "Will be sent when connected");
      }
    }
    #linkChanged(link) {
      const before = this.#link.connection;
      this.#link = link;
      if (link.connection === "ended") this.#session = { ...this.#session, status: "ended" };
      if (link.connection === "live") {
        this.#flushPending();
      } else if (before === "live") {
        for (const entry of this.#pending.values()) if (entry.state === "sent") entry.state = "waiting";
        this.#flushPending();
      }
      this.#view.log.setAttribute("aria-busy", String(link.connection === "replaying"));
      this.#showState();
      this.#emit("e2a-status", this.status);
    }
    #runningTask() {
      return [...this.#tasks.values()].find(({ state }) => state === "running");
    }
    #taskOf(frame) {
      let task = this.#tasks.get(frame.task_id);
      if (!task) {
        task = new Task(this);
        task.id = frame.task_id;
        this.#tasks.set(frame.task_id, task);
        this.#append(task.root);
      }
      return task;
    }

    // -- Painting: frames wait for the next animation frame; a long replay is spread over several --

    #schedule() {
      if (this.#scheduled) return;
      this.#scheduled = true;
      const paint = () => {
        this.#scheduled = false;
        this.#paint();
      };
      if (document.hidden) setTimeout(paint, 250); // a hidden page gets no animation frames
      else requestAnimationFrame(paint);
    }
    #paint() {
      const end = performance.now() + PAINT_BUDGET_MS;
      let done = 0;
      while (done < this.#queue.length && (done % 16 || performance.now() < end)) this.#show(this.#queue[done++]);
      this.#queue.splice(0, done);
      for (const segment of this.dirty) segment.paint();
      this.dirty.clear();
      this.#showState();
      if (this.#follows) this.#scrollDown();
      else if (done) this.#view.jump.hidden = false;
      if (this.#queue.length) this.#schedule();
    }
    #show(frame) {
      switch (frame.type) {
        case "usage":
          this.#usage.tokens += [frame.input_tokens, frame.output_tokens, frame.cache_read_tokens].reduce((sum, n) => sum + (Number(n) || 0), 0);
          this.#usage.cost += Number(frame.cost_usd) || 0;
          return;
        case "secrets_updated":
          return this.#append(note("quiet", `Secrets “${frame.bundle}” are now version ${frame.version}${Array.isArray(frame.keys) ? `: ${frame.keys.join(", ")}` : ""}.`));
        case "context_compacted":
          return this.#append(note("quiet", make("details", null, make("summary", null, "The conversation was shortened for the model"), make("p", { class: "pre-wrap" }, String(frame.summary ?? "")))));
        case "restarted":
          if (frame.task_id) this.#taskOf(frame).restart(Number(frame.discard_after) || 0);
          else this.#runningTask()?.restart(Number(frame.discard_after) || 0);
          return;
        case "expiring":
          this.#view.expiring.hidden = false;
          this.#view.expiring.textContent = frame.alive_because
            ? `This session reaches its time limit in ${frame.seconds_left} s.`
            : `This session ends in ${frame.seconds_left} s unless it is used.`;
          return;
        case "status":
          if (typeof frame.detail === "string") this.#append(note("warn", frame.detail));
          return;
        case "resync":
          return this.#append(note("quiet", "Earlier output is no longer kept; the conversation goes on from here."));
        case "error":
          if (frame.task_id) this.#taskOf(frame).apply(frame);
          else if (typeof frame.seq === "number") this.#append(errorNote(frame));
          return;
        default:
          if (frame.task_id) this.#taskOf(frame).apply(frame);
      }
    }
    #append(element) {
      this.#view.empty.hidden = true;
      this.#view.log.append(element);
    }
    #clear() {
      this.#queue = [];
      this.dirty.clear();
      this.#tasks.clear();
      this.#usage = { tokens: 0, cost: 0 };
      this.#session = { status: "", stopReason: null, endReason: null };
      this.#view.log.replaceChildren(this.#view.empty);
      this.#view.empty.hidden = false;
      for (const { task } of this.#pending.values()) this.#append(task.root);
      this.#follows = true;
    }
    #scrollDown() {
      this.#view.log.scrollTop = 1e9;
      this.#view.jump.hidden = true;
    }

    // -- The parts on screen --

    #build() {
      const view = {};
      view.state = make("span", { class: "state" });
      view.usage = make("span", { class: "usage", part: "usage" });
      view.header = make("header", { class: "header", part: "header" }, make("span", { class: "dot", "aria-hidden": "true" }), make("span", { role: "status", part: "status" }, view.state), view.usage);
      view.bannerText = make("span");
      view.retry = make("button", { type: "button", class: "inline", click: () => this.reconnect() }, "Try now");
      view.banner = make("div", { class: "banner", part: "banner", role: "status", hidden: true }, view.bannerText, " ", view.retry);
      view.expiring = make("div", { class: "banner", part: "banner", role: "alert", hidden: true });
      view.empty = make("p", { class: "empty" }, "Nothing has happened in this session yet.");
      view.log = make("div", { class: "log", part: "log", role: "log", "aria-live": "polite", "aria-label": "Conversation with the agent", tabindex: "0" }, view.empty);
      view.log.addEventListener("scroll", () => {
        const { scrollHeight, scrollTop, clientHeight } = view.log;
        this.#follows = scrollHeight - scrollTop - clientHeight < AT_BOTTOM_PX;
        if (this.#follows) view.jump.hidden = true;
      }, { passive: true });
      view.jump = make("button", { type: "button", class: "jump", hidden: true, click: () => this.#scrollDown() }, "↓ Newest");
      view.input = make("textarea", { id: "input", part: "input", rows: "1", placeholder: "Message…", enterkeyhint: "send" });
      view.send = make("button", { type: "submit", class: "main", part: "send" }, "Send");
      view.stop = make("button", { type: "button", class: "stop", part: "cancel", hidden: true, click: () => this.cancel() }, "Stop");
      view.problem = make("p", { class: "problem", role: "alert", hidden: true });
      view.form = make("form", { class: "composer", part: "composer" }, make("label", { for: "input", class: "hidden-label" }, "Message to the agent. Enter sends, Shift and Enter starts a new line."), view.input, view.stop, view.send, view.problem);
      view.form.addEventListener("submit", (event) => {
        event.preventDefault();
        this.#submit();
      });
      view.input.addEventListener("keydown", (event) => {
        // isComposing: this Enter confirms a word of an input method (Japanese, Chinese …).
        if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
        event.preventDefault();
        this.#submit();
      });
      view.input.addEventListener("input", () => {
        view.input.rows = Math.min(8, view.input.value.split("\n").length);
        view.problem.hidden = true;
      });
      view.top = [view.header, view.expiring, make("div", { class: "middle" }, view.log, view.jump, view.banner), view.form];
      return view;
    }
    #submit() {
      const { input, problem } = this.#view;
      const prompt = input.value;
      if (!prompt.trim() || input.disabled) return;
      if (new TextEncoder().encode(prompt).length > PROMPT_BYTES) {
        problem.textContent = "This message is longer than 256 KiB. Put the text into a file of the sandbox instead.";
        problem.hidden = false;
        return;
      }
      input.value = "";
      input.rows = 1;
      this.sendTask(prompt);
    }
    #showState() {
      const { connection, words } = this.#link;
      const { status, stopReason, endReason } = this.#session;
      const view = this.#view;
      const ended = status === "ended";
      const reason = ended ? END_WORDS[endReason ?? stopReason] ?? endReason : STOP_WORDS[stopReason];
      const name = STATUS_WORDS[status] ?? (status || "Connecting…");
      const text = connection === "idle" ? "Not connected" : reason ? `${name}: ${reason}` : name;
      if (view.state.textContent !== text) view.state.textContent = text;
      view.header.dataset.state = ended ? "ended" : connection === "live" ? status : "off";
      const { tokens, cost } = this.#usage;
      const spent = tokens ? `${compact(tokens)} tokens${cost ? ` · $${cost.toFixed(cost < 1 ? 4 : 2)}` : ""}` : "";
      if (view.usage.textContent !== spent) view.usage.textContent = spent;
      view.banner.hidden = !words || connection === "ended";
      if (view.bannerText.textContent !== words) view.bannerText.textContent = words;
      view.retry.hidden = !["waiting", "stopped", "token"].includes(connection);
      view.form.hidden = this.readOnly;
      view.input.disabled = view.send.disabled = ended || ["stopped", "ended"].includes(connection);
      if (this.hasAttribute("placeholder")) view.input.placeholder = this.placeholder;
      view.stop.hidden = ended || !(status === "running" || status === "waiting" || this.#runningTask());
      view.stop.disabled = connection !== "live";
      if (ended) view.expiring.hidden = true;
    }
  }

  function compact(number) {
    return new Intl.NumberFormat(undefined, { notation: "compact", maximumFractionDigits: 1 }).format(number);
  }

  // ---- Looks: a page themes it by the --e2a-… properties and by ::part() -----------------------------------------------

  const LIGHT = `
    --c-bg: var(--e2a-bg, #fffefb); --c-sunken: var(--e2a-sunken, #f1efe8); --c-text: var(--e2a-text, #1b221f); --c-muted: var(--e2a-muted, #545f59);
    --c-border: var(--e2a-border, #dbd8ce); --c-border-strong: var(--e2a-border-strong, #8e8c80); --c-accent: var(--e2a-accent, #0a6759);
    --c-on-accent: var(--e2a-on-accent, #fffefb); --c-wash: var(--e2a-wash, #dcede7); --c-ok: var(--e2a-ok, #276a2c); --c-warn: var(--e2a-warn, #8a4a08);
    --c-warn-wash: var(--e2a-warn-wash, #f8e8d0); --c-danger: var(--e2a-danger, #a3231a); --c-danger-wash: var(--e2a-danger-wash, #f9e1dd);`;
  const DARK = `
    --c-bg: var(--e2a-bg, #171d1a); --c-sunken: var(--e2a-sunken, #0c110f); --c-text: var(--e2a-text, #e3e8e4); --c-muted: var(--e2a-muted, #9ba7a0);
    --c-border: var(--e2a-border, #29312d); --c-border-strong: var(--e2a-border-strong, #6a766f); --c-accent: var(--e2a-accent, #5ecab0);
    --c-on-accent: var(--e2a-on-accent, #05201a); --c-wash: var(--e2a-wash, #143029); --c-ok: var(--e2a-ok, #85cd8a); --c-warn: var(--e2a-warn, #e8a968);
    --c-warn-wash: var(--e2a-warn-wash, #34240f); --c-danger: var(--e2a-danger, #f28d81); --c-danger-wash: var(--e2a-danger-wash, #3b1814);`;
  const SHEET = new CSSStyleSheet();
  SHEET.replaceSync(`
    :host { ${LIGHT} color-scheme: light dark; }
    @media (prefers-color-scheme: dark) { :host(:not([theme="light"])) { ${DARK} } }
    :host([theme="light"]) { color-scheme: light; }
    :host([theme="dark"]) { ${DARK} color-scheme: dark; }
    :host {
      --c-mono: var(--e2a-mono, ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace);
      --c-round: var(--e2a-radius, 6px);
      display: flex; flex-direction: column; box-sizing: border-box; height: 32rem; min-height: 16rem; overflow: hidden; container-type: inline-size;
      border: 1px solid var(--c-border); border-radius: var(--c-round); background: var(--c-bg); color: var(--c-text); text-align: left;
      font: 0.9375rem/1.55 var(--e2a-font, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif);
    }
    :host([hidden]), [hidden] { display: none !important; }
    *, *::before { box-sizing: border-box; }
    :focus-visible { outline: 2px solid var(--c-accent); outline-offset: 1px; border-radius: 3px; }
    .log:focus-visible, pre:focus-visible { outline-offset: -2px; }
    .hidden-label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
    code, pre { font-family: var(--c-mono); font-size: 0.875em; }
    pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; unicode-bidi: isolate; }

    button { font: inherit; font-size: 0.875rem; font-weight: 550; line-height: 1.2; min-height: 2.25rem; padding: 0.3rem 0.85rem; border: 1px solid var(--c-border-strong); border-radius: var(--c-round); background: var(--c-bg); color: var(--c-text); cursor: pointer; }
    button:hover { border-color: var(--c-text); }
    button:disabled { opacity: 0.5; cursor: default; }
    button.main { background: var(--c-accent); border-color: var(--c-accent); color: var(--c-on-accent); }
    button.main:hover:enabled { filter: brightness(0.92); }
    button.stop { color: var(--c-danger); border-color: currentcolor; }
    button:is(.inline, .copy, .more) { min-height: 0; padding: 0.1rem 0.4rem; border: 0; background: none; color: var(--c-accent); font-size: 0.8125rem; text-decoration: underline; text-underline-offset: 0.18em; }
    @media (pointer: coarse) { button:is(.inline, .copy, .more) { padding-block: 0.5rem; } }

    .header { display: flex; flex-wrap: wrap; gap: 0.15rem 0.6rem; align-items: center; padding: 0.5rem 0.9rem; border-bottom: 1px solid var(--c-border); font-size: 0.8125rem; }
    .state { font-weight: 600; }
    .usage { margin-left: auto; color: var(--c-muted); font-family: var(--c-mono); font-size: 0.75rem; }
    .dot { width: 0.6rem; height: 0.6rem; border-radius: 50%; border: 2px solid var(--c-muted); }
    [data-state="idle"] .dot { background: var(--c-ok); border-color: var(--c-ok); }
    [data-state="running"] .dot { background: var(--c-accent); border-color: var(--c-accent); animation: pulse 1.4s ease-in-out infinite; }
    :is([data-state="waiting"], [data-state="starting"]) .dot { background: var(--c-warn); border-color: var(--c-warn); border-radius: 2px; }
    @keyframes pulse { 50% { opacity: 0.35; } }
    .banner { padding: 0.4rem 0.9rem; background: var(--c-warn-wash); color: var(--c-warn); border-bottom: 1px solid var(--c-border); font-size: 0.8125rem; font-weight: 600; }

    .middle > .banner { position: absolute; inset: 0 0 auto; } /* over the log: a short cut must not make the text jump */

    .middle { position: relative; flex: 1; min-height: 0; display: flex; }
    .log { flex: 1; min-width: 0; overflow-y: auto; overscroll-behavior: contain; padding: 1rem 0.9rem; }
    .log > * { max-width: 52rem; margin-inline: auto; }
    .empty { color: var(--c-muted); text-align: center; margin-block: 2.5rem; }
    .jump { position: absolute; bottom: 0.75rem; left: 50%; translate: -50% 0; box-shadow: 0 4px 14px rgb(0 0 0 / 0.25); background: var(--c-bg); }
    .task + .task, .task + .note, .note + .task { margin-top: 1.4rem; }
    .task.finished:not(:nth-last-child(-n + 4)) { content-visibility: auto; contain-intrinsic-size: auto 14rem; }
    .prompt { width: fit-content; max-width: 88%; margin-left: auto; padding: 0.5rem 0.85rem; border-radius: var(--c-round); background: var(--c-wash); }
    .prompt-text { white-space: pre-wrap; overflow-wrap: anywhere; }
    [data-agent="shell"] .prompt-text { font-family: var(--c-mono); font-size: 0.875em; }
    .refused .prompt { background: var(--c-danger-wash); }
    .hint { margin: 0.15rem 0 0; font-size: 0.75rem; color: var(--c-muted); }
    .hint:empty { display: none; }
    .body { margin-top: 0.75rem; display: grid; gap: 0.75rem; }
    .body > * { min-width: 0; }
    .foot { margin: 0.6rem 0 0; font-size: 0.75rem; color: var(--c-muted); font-family: var(--c-mono); }
    .foot::before { content: "■ "; }
    .foot.good::before { content: "✓ "; color: var(--c-ok); }
    .foot.bad { color: var(--c-danger); }
    .foot.bad::before { content: "✕ "; }
    .note { padding: 0.5rem 0.8rem; border-left: 3px solid var(--c-border-strong); background: var(--c-sunken); font-size: 0.875rem; overflow-wrap: anywhere; }
    .note.quiet { font-size: 0.8125rem; color: var(--c-muted); }
    .note.warn { border-color: var(--c-warn); background: var(--c-warn-wash); }
    .note.bad { border-color: var(--c-danger); background: var(--c-danger-wash); }
    .note p { margin: 0 0 0.35rem; } .note p:last-child { margin: 0; }
    .small { font-size: 0.8125rem; } .pre-wrap { white-space: pre-wrap; }
    .note summary { cursor: pointer; }

    .tool { border: 1px solid var(--c-border); border-radius: var(--c-round); background: var(--c-sunken); overflow: hidden; }
    .tool summary { display: flex; gap: 0.6rem; align-items: baseline; padding: 0.4rem 0.7rem; cursor: pointer; list-style: none; }
    .tool summary::-webkit-details-marker { display: none; }
    .tool summary::before { content: "▸"; color: var(--c-muted); }
    .tool details[open] > summary::before { content: "▾"; }
    .tool summary:focus-visible { outline-offset: -2px; }
    .tool-name { font: 600 0.75rem/1.4 var(--c-mono); color: var(--c-muted); }
    .tool summary code { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 600; }
    .exit { font: 600 0.72rem/1.5 var(--c-mono); white-space: nowrap; color: var(--c-muted); }
    .exit.good { color: var(--c-ok); } .exit.good::before { content: "✓ "; }
    .exit.bad { color: var(--c-danger); } .exit.bad::before { content: "✕ "; }
    .exit.busy { animation: pulse 1.4s ease-in-out infinite; }
    .input-name { margin: 0; padding: 0.3rem 0.7rem 0; font: 600 0.72rem/1.4 var(--c-mono); color: var(--c-muted); border-top: 1px solid var(--c-border); }
    .input { padding: 0.35rem 0.7rem; max-height: 12rem; overflow: auto; }
    .output { border-top: 1px solid var(--c-border); }
    .raw .output { border-top: 0; }
    .output pre { padding: 0.55rem 0.7rem; max-height: 19rem; overflow: auto; overscroll-behavior-y: auto; font-size: 0.8125rem; line-height: 1.5; }
    .output pre.whole { max-height: none; }
    .stderr { color: var(--c-danger); }
    .more { margin: 0.15rem 0.4rem 0.35rem; }
    .dropped { margin: 0; padding: 0.35rem 0.7rem; font-size: 0.75rem; color: var(--c-muted); border-bottom: 1px dashed var(--c-border); }

    .markdown { overflow-wrap: anywhere; }
    .markdown > * { margin: 0 0 0.7rem; } .markdown > :last-child { margin-bottom: 0; }
    .markdown :is(h3, h4, h5, h6) { margin: 1rem 0 0.4rem; line-height: 1.3; font-size: 1rem; font-weight: 650; }
    .markdown h3 { font-size: 1.15rem; } .markdown > :first-child { margin-top: 0; }
    .markdown :is(ul, ol) { padding-left: 1.4rem; margin-block: 0 0.7rem; } .markdown li > :is(ul, ol) { margin: 0.2rem 0 0; } .markdown li + li { margin-top: 0.2rem; }
    .markdown p { margin-block: 0 0.7rem; }
    .markdown a { color: var(--c-accent); text-underline-offset: 0.18em; }
    .markdown :not(pre) > code { background: var(--c-sunken); border-radius: 4px; padding: 0.1em 0.3em; }
    .markdown blockquote { margin-inline: 0; padding-left: 0.8rem; border-left: 3px solid var(--c-border); color: var(--c-muted); }
    .markdown hr { border: 0; border-top: 1px solid var(--c-border); margin-block: 1rem; }
    .markdown .table { overflow-x: auto; }
    .markdown table { border-collapse: collapse; font-size: 0.875rem; }
    .markdown :is(th, td) { border: 1px solid var(--c-border); padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; overflow-wrap: normal; }
    .markdown th { background: var(--c-sunken); }
    .code { margin-inline: 0; border: 1px solid var(--c-border); border-radius: var(--c-round); background: var(--c-sunken); overflow: hidden; }
    .code figcaption { display: flex; justify-content: space-between; align-items: center; padding: 0.15rem 0.35rem 0.15rem 0.7rem; border-bottom: 1px solid var(--c-border); font: 600 0.72rem/1.6 var(--c-mono); color: var(--c-muted); }
    .code pre { white-space: pre; overflow-x: auto; overflow-wrap: normal; padding: 0.6rem 0.7rem; font-size: 0.8125rem; line-height: 1.5; }
    .code pre code { font-size: inherit; }

    .composer { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: flex-end; padding: 0.65rem 0.9rem; border-top: 1px solid var(--c-border); }
    textarea { flex: 1; min-width: 0; min-height: 2.25rem; max-height: 12rem; padding: 0.38rem 0.65rem; resize: none; border: 1px solid var(--c-border-strong); border-radius: var(--c-round); background: var(--c-bg); color: inherit; font: inherit; font-size: 1rem; line-height: 1.4; }
    textarea:focus-visible { outline-offset: -1px; border-color: var(--c-accent); border-radius: var(--c-round); }
    textarea:disabled { background: var(--c-sunken); }
    ::placeholder { color: var(--c-muted); opacity: 1; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
    .problem { flex-basis: 100%; margin: 0; color: var(--c-danger); font-size: 0.8125rem; font-weight: 600; }
    @container (min-width: 44rem) { .log { padding: 1.25rem 1.5rem; } .header { padding-inline: 1.5rem; } .composer { padding-inline: max(1.5rem, (100% - 52rem) / 2); } }
    @media (prefers-reduced-motion: reduce) { * { animation: none !important; } }
  `);

  customElements.define("e2a-chat", E2AChat);
})();
