// A form or a button with `data-confirm="Question?"` asks before it submits. (With htmx use hx-confirm.)

document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.confirm ?? event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});
