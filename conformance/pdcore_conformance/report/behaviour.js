"use strict";
// The page is complete without this script, which adds buttons that copy a command, and a filter of the cases.
for (const command of document.querySelectorAll(".command")) {
  const text = command.querySelector("pre");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  command.append(button);
}
const cases = document.getElementById("every-case");
if (cases) {
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "Filter by words of an id or outcome";
  field.setAttribute("aria-label", "Filter the cases");
  const count = document.createElement("p");
  count.className = "soft";
  count.setAttribute("role", "status");
  const groups = [...cases.querySelectorAll("details")].map((group) => ({
    group,
    rows: [...group.querySelectorAll("tbody tr")].map((row) => ({
      row, text: (group.dataset.name + "::" + row.textContent).toLowerCase(),
    })),
  }));
  let waiting = 0;
  field.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let total = 0;
      for (const { group, rows } of groups) {
        let shown = 0;
        for (const { row, text } of rows) {
          row.hidden = !words.every((word) => text.includes(word));
          shown += row.hidden ? 0 : 1;
        }
        group.hidden = shown === 0;
        group.open = words.length > 0 && shown > 0;
        total += shown;
      }
      count.textContent = words.length ? total.toLocaleString("en") + " cases" : "";
    }, 120);
  });
  cases.prepend(field, count);
}
