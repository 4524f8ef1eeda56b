"use strict";
// Sorts a table by a column: by a click, or with the keyboard, on its heading.
// The numbers of a column are in data-value, empty where there is none: those rows stay last.
function compare(one, other, sign) {
  if (one === "" || other === "") return (one === "") - (other === "");
  const difference = Number(one) - Number(other);
  return sign * (Number.isNaN(difference) ? one.localeCompare(other) : difference);
}
function sort(table, head) {
  const first = head.dataset.first || "descending";
  const second = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? second : first;
  for (const each of head.parentElement.cells) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const body = table.tBodies[0];
  const value = (row) => row.cells[head.cellIndex].dataset.value;
  const sign = order === "ascending" ? 1 : -1;
  body.append(...Array.from(body.rows).sort((a, b) => compare(value(a), value(b), sign)));
}
for (const table of document.querySelectorAll("table.sortable")) {
  for (const button of table.querySelectorAll("thead span")) {
    button.setAttribute("role", "button");
    button.tabIndex = 0;
    button.addEventListener("click", () => sort(table, button.parentElement));
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") if (event.key !== " ") return;
      event.preventDefault(); // a space scrolls
      sort(table, button.parentElement);
    });
  }
}
