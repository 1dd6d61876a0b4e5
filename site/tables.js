// Tables can be sorted by a click on a column's head. `datatables` is DataTables as itables brings it, a data URL:
// so pages need no network, and work from a disk, too.
"use strict";

const MISSING = new Set(["", "–", "no data here"]);
const SECONDS = { s: 1, min: 60, h: 3600 };

// One head, and no merged cells: DataTables cannot read others, which stay as they are.
function isPlain(table) {
  const rows = [...table.rows];
  const alike = (row) => row.cells.length === rows[0].cells.length;
  const single = (cell) => cell.colSpan === 1 && cell.rowSpan === 1;
  return (
    table.tHead?.rows.length === 1 &&
    table.tBodies.length === 1 &&
    rows.length > 2 &&
    rows.every((row) => alike(row) && [...row.cells].every(single))
  );
}

// The number that a cell begins with: 62.0 ± 1.1, +3.2 (+1.0 to +5.4), 48 min.
function leadingNumber(text) {
  const found = text.replace("−", "-").match(/^([+-]?[\d.]+)(?: (s|min|h)\b)?/);
  return found ? Number(found[1]) * (SECONDS[found[2]] ?? 1) : NaN;
}

function addSortKeys(table) {
  const rows = [...table.tBodies[0].rows];
  for (let i = 0; i < rows[0].cells.length; i++) {
    const texts = rows.map((row) => row.cells[i].textContent.trim());
    const numbers = texts.map(leadingNumber);
    if (texts.every((text, k) => MISSING.has(text) || !Number.isNaN(numbers[k]))) {
      rows.forEach((row, k) => (row.cells[i].dataset.order = MISSING.has(texts[k]) ? "" : numbers[k]));
    }
  }
}

// Buttons that filter the ledger by verdict; the box beside them filters by any words.
function addButtons(table, shown) {
  const verdicts = [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim().replace(/^\W+ /, ""));
  const bar = document.createElement("div");
  bar.className = "filters";
  for (const verdict of ["", ...new Set(verdicts)]) {
    const button = document.createElement("button");
    button.textContent = verdict || "all";
    button.addEventListener("click", () => shown.column(0).search(verdict).draw());
    bar.append(button);
  }
  table.closest(".dt-container").prepend(bar);
}

document.addEventListener("DOMContentLoaded", async () => {
  const all = document.querySelectorAll("article table:not(.gallery), div.body table:not(.gallery)");
  const tables = [...all].filter(isPlain);
  if (!tables.length) return;
  const { default: DataTable } = await import(datatables);
  const options = { paging: false, info: false, autoWidth: false, order: [] };
  for (const table of tables) {
    const ledger = table.classList.contains("ledger");
    addSortKeys(table);
    const shown = new DataTable(table, { ...options, searching: ledger });
    if (ledger) addButtons(table, shown);
  }
});
