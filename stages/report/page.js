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
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (isDescending ? -1 : 1);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    titles.forEach((each) => each.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
  }));
}
// All sections are printed, also those that are folded on the screen.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  unfolded.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => { unfolded.forEach((details) => { details.open = false; }); });
