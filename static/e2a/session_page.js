// The dashboard's own chat: gets a fresh session token from our page when the one it has expires.

const chat = document.querySelector("e2a-chat[data-token-url]");

async function freshToken() {
  const csrf = JSON.parse(document.body.getAttribute("hx-headers"))["X-CSRFToken"];
  const answer = await fetch(chat.dataset.tokenUrl, { method: "POST", headers: { "X-CSRFToken": csrf } });
  if (!answer.ok) throw new Error(`no fresh token: ${answer.status}`);
  return (await answer.json()).token;
}

chat?.addEventListener("e2a-token-needed", (event) => event.respondWith(freshToken()));
