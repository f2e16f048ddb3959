"use strict";
for (const scroll of document.querySelectorAll(".sortable")) {
  const body = scroll.querySelector("tbody");
  const rows = [...body.rows];
  const number = (row, column) => parseFloat(row.cells[column].textContent.replace(/,/g, ""));
  const compare = (column, sign) => (one, other) => {
    const [a, b] = [number(one, column), number(other, column)];
    if (isNaN(a) || isNaN(b)) {
      if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1;  // what has no number comes last
      return sign * one.cells[column].textContent.localeCompare(other.cells[column].textContent);
    }
    return sign * (a - b);
  };
  for (const heading of scroll.querySelectorAll("th")) {
    heading.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const each of scroll.querySelectorAll("th")) each.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...rows.sort(compare(heading.cellIndex, sign)));
    });
  }
  const filter = document.createElement("input");
  filter.className = "filter";
  filter.type = "search";
  filter.placeholder = "filter rows; click headings to sort";
  filter.setAttribute("aria-label", "only rows with these words");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  scroll.before(filter);
}
