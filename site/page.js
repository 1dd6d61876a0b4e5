// One switch folds all code of a notebook's page, and is folded first where there are outputs to read.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const page = document.querySelector("article, div.body");
  if (!page?.querySelector(".cell_input")) return;
  const button = document.createElement("button");
  button.className = "code-switch";
  const fold = (folded) => {
    page.classList.toggle("code-folded", folded);
    button.textContent = folded ? "Show code" : "Hide code";
  };
  button.addEventListener("click", () => fold(!page.classList.contains("code-folded")));
  page.prepend(button);
  fold(Boolean(page.querySelector(".cell_output")));
});
