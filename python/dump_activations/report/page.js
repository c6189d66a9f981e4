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

// What a mark stands for, also under a finger, where browsers show no titles.
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

// The attention of the chosen board.
const data = document.getElementById("attention-data");
document.getElementById("chosen")?.addEventListener("change", (event) => {
  const cells = document.querySelectorAll(".head .board i");
  JSON.parse(data.textContent)[event.target.value].split(" ").forEach((percent, i) => {
    cells[i].textContent = percent;
    cells[i].className = `h${Math.min(Math.floor(Math.sqrt(percent)), 9)}`;
  });
  const board = document.querySelectorAll(".examples .board")[event.target.value];
  document.querySelector(".chosen .board").replaceWith(board.cloneNode(true));
});
