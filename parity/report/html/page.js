// A field that shows only the taps whose names contain what is typed, and columns that sort their table.
const find = document.createElement("label");
find.className = "find";
find.innerHTML = 'taps with <input type="search" placeholder="attn.wo" aria-label="Part of a name"> in their names';
document.querySelector("#taps .key")?.before(find);
find.firstElementChild.addEventListener("input", (event) => {
  const part = event.target.value.trim().toLowerCase();
  for (const row of document.querySelectorAll("table.heat tbody tr"))
    row.hidden = !row.firstElementChild.textContent.toLowerCase().includes(part);
  for (const tap of document.querySelectorAll("details.tap"))
    tap.hidden = !tap.querySelector("b").textContent.toLowerCase().includes(part);
});
const number = (cell) =>
  cell.textContent.includes("∞") ? Infinity : parseFloat(cell.textContent.replace(/[^0-9.e+-]/g, "")) || -1;
for (const head of document.querySelectorAll("table.heat thead th")) {
  head.classList.add("sorts");
  head.title = head.cellIndex ? "largest first" : "in order of execution";
  const body = head.closest("table").tBodies[0];
  const order = [...body.rows];
  head.addEventListener("click", () => {
    const at = head.cellIndex;
    body.append(...(at ? [...order].sort((a, b) => number(b.cells[at]) - number(a.cells[at])) : order));
  });
}
