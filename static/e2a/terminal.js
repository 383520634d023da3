// The terminal's page: a shell in a sandbox, over `WS /v1/sandboxes/{id}/terminal` (docs/reference/frames.md).
// Binary messages are the terminal's bytes, text messages are JSON. The shell outlives the socket: after a lost
// connection this comes back with how many of its bytes it has seen.

/* global Terminal, FitAddon */

const BACK_OFF_MS = [300, 700, 1500, 3000, 6000, 10000];
const CHUNK_BYTES = 32 * 1024; // A message has at most 64 KiB.
const FINAL = new Map([
  [4400, "This page and the server do not understand each other. Reload the page."],
  [4403, "This page may not open a terminal here."],
  [4404, "There is no such sandbox."],
  [4410, "The sandbox has ended."],
]);

const box = document.getElementById("terminal");
const status = document.getElementById("terminal-status");
const takeButton = document.getElementById("terminal-take");
const againButton = document.getElementById("terminal-again");

/** What tells this tab from others: when it comes back, it types on. */
function clientName() {
  const made = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16)).join("");
  try {
    const known = sessionStorage.getItem("e2a-terminal") ?? made();
    sessionStorage.setItem("e2a-terminal", known);
    return known;
  } catch {
    return made(); // Storage is forbidden in this browser: a reload is somebody new.
  }
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  return {
    background: value("--code-bg"),
    foreground: value("--ink"),
    cursor: value("--accent"),
    cursorAccent: value("--code-bg"),
    selectionBackground: value("--accent"),
    selectionForeground: value("--on-accent"),
  };
}

class GivenUp extends Error {}

/** A token for the sandbox, from our own page. */
async function freshToken() {
  const csrf = JSON.parse(document.body.getAttribute("hx-headers"))["X-CSRFToken"];
  const answer = await fetch(box.dataset.tokenUrl, { method: "POST", headers: { "X-CSRFToken": csrf } });
  if (answer.redirected || answer.status === 403) throw new GivenUp("You are signed out. Sign in, then reload this page.");
  if (answer.status === 404) throw new GivenUp("There is no such sandbox.");
  if (answer.status === 409) throw new GivenUp((await answer.json()).detail);
  if (!answer.ok) throw new Error(`no token: ${answer.status}`);
  return (await answer.json()).token;
}

class TerminalPage {
  constructor() {
    const style = getComputedStyle(document.documentElement);
    this.terminal = new Terminal({
      fontFamily: style.getPropertyValue("--mono").trim(),
      fontSize: 13,
      minimumContrastRatio: 4.5,
      scrollback: 10000,
      theme: theme(),
    });
    this.fit = new FitAddon.FitAddon();
    this.terminal.loadAddon(this.fit);
    this.client = clientName();
    this.shell = null;
    this.after = 0;
    this.role = "viewer";
    this.isReplaying = false;
    this.exited = null;
    this.tries = 0;
    this.socket = null;
    this.timer = null;
  }

  start() {
    this.terminal.open(box);
    this.terminal.textarea.setAttribute("aria-label", "Terminal");
    this.terminal.attachCustomKeyEventHandler((event) => !(event.key === "Tab" && event.shiftKey));
    this.terminal.onData((text) => this.type(new TextEncoder().encode(text)));
    this.terminal.onBinary((text) => this.type(Uint8Array.from(text, (letter) => letter.charCodeAt(0))));
    takeButton.addEventListener("click", () => {
      this.say({ type: "take" });
      this.terminal.focus();
    });
    againButton.addEventListener("click", () => this.newShell());
    new ResizeObserver(() => this.sizeSoon()).observe(box);
    const repaint = () => (this.terminal.options.theme = theme());
    new MutationObserver(repaint).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
    window.addEventListener("online", () => this.timer && this.connect());
    this.fit.fit();
    this.connect();
  }

  async connect() {
    clearTimeout(this.timer);
    this.timer = null;
    this.show("Connecting…", "wait");
    let token;
    try {
      token = await freshToken();
    } catch (error) {
      if (error instanceof GivenUp) this.show(error.message, "over");
      else this.connectLater();
      return;
    }
    const query = new URLSearchParams({ token, client: this.client, cols: this.terminal.cols, rows: this.terminal.rows });
    if (this.shell) {
      query.set("shell", this.shell);
      query.set("after", this.after);
    }
    const socket = new WebSocket(`${box.dataset.connectUrl}?${query}`);
    socket.binaryType = "arraybuffer";
    socket.addEventListener("message", ({ data }) => {
      if (typeof data === "string") this.hear(JSON.parse(data));
      else this.print(new Uint8Array(data));
    });
    socket.addEventListener("close", (event) => this.closed(event));
    this.socket = socket;
  }

  connectLater() {
    const wait = BACK_OFF_MS[Math.min(this.tries, BACK_OFF_MS.length - 1)] * (0.75 + Math.random() / 2);
    this.tries += 1;
    this.show("The connection is lost; coming back…", "wait");
    this.timer = setTimeout(() => this.connect(), wait);
  }

  closed({ code }) {
    this.socket = null;
    takeButton.hidden = true;
    if (this.exited !== null) this.showExit();
    else if (FINAL.has(code)) this.show(FINAL.get(code), "over");
    else this.connectLater(); // With a fresh token, so that 4401 mends itself or is told by the token's call.
  }

  newShell() {
    this.exited = null;
    this.shell = null;
    this.after = 0;
    againButton.hidden = true;
    this.connect();
    this.terminal.focus();
  }

  // -- from the server

  print(bytes) {
    this.after += bytes.length;
    this.terminal.write(bytes, this.ends(this.after));
  }

  /** What to call once everything up to `offset` is drawn: then the replay may be over. */
  ends(offset) {
    return this.isReplaying && offset >= this.head ? () => (this.isReplaying = false) : undefined;
  }

  hear(frame) {
    switch (frame.type) {
      case "ready":
        this.ready(frame);
        break;
      case "resync":
        this.after = frame.after;
        this.terminal.reset();
        break;
      case "gap":
        this.after = frame.next_after;
        this.terminal.write(`\r\n\x1b[0;7m ${frame.dropped_bytes} bytes are no longer kept \x1b[0m\r\n`, this.ends(this.after));
        break;
      case "role":
        this.becomes(frame.role);
        break;
      case "resize":
        if (this.role === "viewer") this.terminal.resize(frame.cols, frame.rows);
        break;
      case "status":
        this.showRole(frame.state === "paused");
        break;
      case "exit":
        this.exited = frame;
        break;
      case "error":
        if (frame.code !== "read_only") this.show(frame.detail, "over");
        break;
    }
  }

  ready(frame) {
    this.tries = 0;
    if (this.shell !== null && this.shell !== frame.shell) this.terminal.reset();
    if (this.shell === null) this.terminal.reset();
    this.shell = frame.shell;
    this.after = frame.after;
    // Old output may ask the terminal things; the shell that asked has had its answer.
    this.head = frame.head;
    this.isReplaying = frame.after < frame.head;
    if (frame.role === "viewer" && frame.cols) this.terminal.resize(frame.cols, frame.rows);
    this.becomes(frame.role);
  }

  becomes(role) {
    this.role = role;
    this.terminal.options.disableStdin = role !== "writer";
    this.terminal.options.cursorBlink = role === "writer";
    this.showRole(false);
    if (role === "writer") this.size();
  }

  // -- to the server

  say(frame) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(frame));
  }

  type(bytes) {
    if (this.exited !== null && this.socket === null) {
      if (bytes.length === 1 && bytes[0] === 13) this.newShell();
      return;
    }
    if (this.role !== "writer" || this.isReplaying || this.socket?.readyState !== WebSocket.OPEN) return;
    for (let at = 0; at < bytes.length; at += CHUNK_BYTES) this.socket.send(bytes.subarray(at, at + CHUNK_BYTES));
  }

  sizeSoon() {
    clearTimeout(this.sizing);
    this.sizing = setTimeout(() => this.role === "writer" && this.size(), 80);
  }

  size() {
    const size = this.fit.proposeDimensions();
    if (!size || !(size.cols > 0 && size.rows > 0)) return;
    this.fit.fit();
    if (this.told === `${size.cols} ${size.rows} ${this.shell}`) return;
    this.told = `${size.cols} ${size.rows} ${this.shell}`;
    this.say({ type: "resize", cols: size.cols, rows: size.rows });
  }

  // -- to the reader

  show(text, tone) {
    status.textContent = text;
    status.dataset.tone = tone;
  }

  showRole(isPaused) {
    takeButton.hidden = this.role === "writer";
    if (this.role === "viewer") this.show("Read-only: someone else types.", "look");
    else this.show(isPaused ? "The sandbox is paused; it goes on when you type." : "Connected.", isPaused ? "wait" : "live");
  }

  showExit() {
    const how = this.exited.exit_code === null ? "in a way that nobody saw" : `with ${this.exited.exit_code}`;
    this.show(`The shell has ended ${how}. Enter starts a new one.`, "over");
    this.terminal.options.disableStdin = false;
    againButton.hidden = false;
  }
}

if (box) new TerminalPage().start();
