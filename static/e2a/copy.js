// Buttons with `data-copy` put text on the clipboard: that of the element named by `data-copy-from` (a selector),
// else of the code block around the button. Works for content that htmx swaps in, because it listens on the document.

const SHOWN_FOR_MS = 1600;

function sourceOf(button) {
  const selector = button.dataset.copyFrom;
  return selector ? document.querySelector(selector) : button.closest(".code")?.querySelector("code");
}

async function copy(text, source) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No clipboard outside of a secure context (plain http on a LAN address): select it, so that Ctrl+C does it.
    getSelection()?.selectAllChildren(source);
    return false;
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  const source = button && sourceOf(button);
  if (!source) return;
  const copied = await copy("value" in source ? source.value : source.textContent, source);
  button.dataset.label ??= button.textContent;
  button.textContent = copied ? "Copied" : "Press Ctrl+C";
  clearTimeout(Number(button.dataset.timer));
  button.dataset.timer = String(setTimeout(() => (button.textContent = button.dataset.label), SHOWN_FOR_MS));
});
