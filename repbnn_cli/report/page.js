
"use strict";
// Tables sort by a click on a heading: numbers first with the largest, text by the alphabet; a second click reverses.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = Number.parseFloat(text.replace(/,/g, "").replace("−", "-"));
    return headings[column].classList.contains("n") ? (Number.isNaN(number) ? -Infinity : number) : text;
  };
  const sort = (heading, column) => {
    const numeric = heading.classList.contains("n");
    const now = heading.getAttribute("aria-sort");
    const down = now ? now === "ascending" : numeric;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort(([a], [b]) => (numeric ? (a === b ? 0 : a < b ? -1 : 1) : a.localeCompare(b, "en", {numeric: true})));
    if (down) rows.reverse();
    body.append(...rows.map(([, row]) => row));
  };
  headings.forEach((heading, column) => {
    const button = heading.querySelector("[role=button]"); // a <button> is left out where print repeats a heading
    button?.addEventListener("click", () => sort(heading, column));
    button?.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        sort(heading, column);
      }
    });
  });
}
// Paper cannot be unfolded: everything but what is for the screen is open while printing.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open]):not(.screen)")];
  opened.forEach((details) => (details.open = true));
});
addEventListener("afterprint", () => opened.forEach((details) => (details.open = false)));
