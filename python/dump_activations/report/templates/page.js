"use strict";
const root = document.documentElement;
root.classList.add("scripted");

// The other of light and dark than is shown.
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// Show the meaning of a mark under a finger too, where browsers show no titles.
const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;
document.addEventListener("pointerdown", (event) => {
  const title = event.target.querySelector?.(":scope > title");
  tip.hidden = !title;
  if (!title) return;
  tip.textContent = title.textContent;
  const { clientX, clientY } = event;
  tip.style.left = `${Math.min(clientX, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.max(clientY - tip.offsetHeight - 12, 0)}px`;
});

// The attention of the chosen board: a percentage a cell, head after head.
const chosen = document.getElementById("chosen");
const showChosen = () => {
  const data = JSON.parse(document.getElementById("attention-data").textContent)[chosen.value];
  document.querySelectorAll(".head .board").forEach((board, head) => {
    const cells = Array.from({ length: 16 }, (_, cell) => {
      const percent = data.charCodeAt(16 * head + cell) - "?".charCodeAt(0);
      const element = document.createElement("i");
      element.textContent = percent;
      element.className = `h${Math.min(Math.floor(Math.sqrt(percent)), 9)}`;
      return element;
    });
    board.replaceChildren(...cells);
  });
  const board = document.querySelectorAll(".examples .board")[chosen.value].cloneNode(true);
  board.id = "chosen-board";
  document.getElementById("chosen-board").replaceWith(board);
};
chosen?.addEventListener("change", showChosen);
if (chosen) showChosen();
