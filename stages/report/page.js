for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => title.querySelector("button").addEventListener("click", () => {
    const isNumeric = title.classList.contains("number");
    const current = title.getAttribute("aria-sort");
    const isDescending = current ? current === "ascending" : isNumeric;
    const key = (row) => {
      const cell = row.cells[column];
      if (!isNumeric) return cell.textContent.trim().toLowerCase();
      return cell.dataset.value === "" ? null : Number(cell.dataset.value);
    };
    const isUnfinished = (row) => row.classList.contains("unfinished");
    const order = (a, b) => {
      if (isUnfinished(a) !== isUnfinished(b)) return isUnfinished(a) - isUnfinished(b);
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (isDescending ? -1 : 1);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    titles.forEach((each) => each.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
  }));
}
// On a narrow screen a plot has the width of the screen; a tap shows it large, to be scrolled.
for (const figure of document.querySelectorAll("figure")) {
  figure.addEventListener("click", () => figure.classList.toggle("large"));
}
// All sections are printed, also those that are folded on the screen.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  unfolded.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => { unfolded.forEach((details) => { details.open = false; }); });
