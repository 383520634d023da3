// <time datetime="…" data-local>: shows a UTC time in the reader's own zone and language; the UTC text stays as its title.

const FORMAT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

function localise(root) {
  for (const element of root.querySelectorAll("time[data-local][datetime]")) {
    const moment = new Date(element.dateTime);
    if (Number.isNaN(moment.getTime())) continue;
    element.title ||= element.textContent.trim();
    element.textContent = FORMAT.format(moment);
    element.removeAttribute("data-local");
  }
}

localise(document);
document.addEventListener("htmx:load", (event) => localise(event.target.parentElement ?? document));
