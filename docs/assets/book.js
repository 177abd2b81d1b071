// Small scripts of the site: mathematics, and keyboard access to what scrolls sideways.
"use strict";

function renderMath(root) {
  root.querySelectorAll(".arithmatex:not([data-rendered])").forEach((node) => {
    const source = node.textContent.trim();
    const display = source.startsWith("\\[");
    const tex = source.replace(/^\\[[(]/, "").replace(/\\[\])]$/, "");
    node.setAttribute("data-rendered", "");
    katex.render(tex, node, { displayMode: display, throwOnError: false, strict: false });
  });
}

// Headings with mathematics reach the table of contents as text.
function renderMathInNavigation(root) {
  root.querySelectorAll(".md-nav__link .md-ellipsis").forEach((node) => {
    const parts = node.textContent.split(/\\\((.+?)\\\)/);
    if (parts.length < 3) return;
    node.textContent = "";
    parts.forEach((part, i) => {
      const piece = document.createElement("span");
      if (i % 2) katex.render(part, piece, { throwOnError: false, strict: false });
      else piece.textContent = part;
      node.append(piece);
    });
  });
}

// What scrolls must be reachable without a mouse.
function focusScrollable(root) {
  root.querySelectorAll(".nb-output pre, .nb-table, .md-typeset__scrollwrap, .katex-display").forEach((node) => {
    if (node.scrollWidth > node.clientWidth && !node.hasAttribute("tabindex")) node.setAttribute("tabindex", "0");
  });
}

function ready() {
  renderMath(document);
  renderMathInNavigation(document);
  focusScrollable(document);
}

// `document$` is the theme's stream of pages; without it (script blocked, theme changed) render once.
if (typeof document$ !== "undefined") document$.subscribe(ready);
else if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", ready);
else ready();
