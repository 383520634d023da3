// The desktop's page: a sandbox's screen by noVNC, over `WS /v1/sandboxes/{id}/desktop` (docs/reference/frames.md).

import RFB from "../vendor/novnc/core/rfb.js";

const BACK_OFF_MS = [300, 700, 1500, 3000, 6000, 10000];
const FINAL = new Map([
  [4400, "This page and the server do not understand each other. Reload the page."],
  [4403, "This page may not show a desktop here."],
  [4404, "This sandbox has no desktop. Make one of the template cua."],
  [4410, "The sandbox has ended."],
]);

const box = document.getElementById("desktop");
const status = document.getElementById("desktop-status");
const viewOnly = document.getElementById("desktop-view-only");

let tries = 0;
let round = 0;
let screen = null;

function show(text, tone) {
  status.textContent = text;
  status.dataset.tone = tone;
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

function connectLater(mine) {
  const wait = BACK_OFF_MS[Math.min(tries, BACK_OFF_MS.length - 1)] * (0.75 + Math.random() / 2);
  tries += 1;
  show("The connection is lost; coming back…", "wait");
  setTimeout(() => mine === round && connect(), wait);
}

async function connect() {
  round += 1;
  const mine = round;
  screen?.disconnect();
  screen = null;
  show("Connecting…", "wait");
  let token;
  try {
    token = await freshToken();
  } catch (error) {
    if (mine !== round) return;
    if (error instanceof GivenUp) show(error.message, "over");
    else connectLater(mine);
    return;
  }
  if (mine !== round) return;
  const query = new URLSearchParams({ token, view_only: viewOnly.checked ? "1" : "0" });
  const socket = new WebSocket(`${box.dataset.connectUrl}?${query}`);
  let code = 0;
  socket.addEventListener("close", (event) => (code = event.code));
  screen = new RFB(box, socket, { shared: true });
  screen.viewOnly = viewOnly.checked;
  screen.scaleViewport = true;
  screen.background = "transparent";
  screen.addEventListener("connect", () => {
    tries = 0;
    show(viewOnly.checked ? "Read-only." : "Connected.", viewOnly.checked ? "look" : "live");
  });
  screen.addEventListener("disconnect", () => {
    if (mine !== round) return;
    if (FINAL.has(code)) show(FINAL.get(code), "over");
    else connectLater(mine);
  });
}

viewOnly.addEventListener("change", connect);
window.addEventListener("online", () => screen === null && connect());
connect();
