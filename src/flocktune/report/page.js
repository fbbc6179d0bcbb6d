const root = document.documentElement, theme = document.querySelector(".theme");
const dark = () => getComputedStyle(root).colorScheme === "dark" ||
  (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
theme.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; name(); };
theme.hidden = false;
name();

// A click on a heading sorts by its column: numbers by size, the largest first, words by the alphabet.
for (const heading of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  heading.append(button);
  button.onclick = () => {
    const body = heading.closest("table").tBodies[0], place = heading.cellIndex, was = heading.ariaSort;
    const rows = [...body.rows], numbers = rows.some(row => row.cells[place].dataset.value);
    const sign = (was ? was === "ascending" : numbers) ? -1 : 1;
    const value = row => Number(row.cells[place].dataset.value ?? -1e300);
    const words = row => row.cells[place].textContent.trim();
    rows.sort((a, b) => sign * (numbers ? value(a) - value(b) : words(a).localeCompare(words(b), "en", { numeric: true })));
    for (const other of heading.parentNode.cells) other.ariaSort = null;
    heading.ariaSort = sign < 0 ? "descending" : "ascending";
    body.append(...rows);
  };
}
