// Opens a page in jsdom, steps through it, and writes what it shows, as JSON: `node page.js PAGE`.
"use strict";
const { readFileSync } = require("fs");
const { JSDOM, VirtualConsole } = require("jsdom");
const errors = [];
const console_ = new VirtualConsole();
console_.on("jsdomError", (error) => errors.push(String(error)));
const { window } = new JSDOM(readFileSync(process.argv[2], "utf8"), { runScripts: "dangerously", virtualConsole: console_ });
const page = window.document;
const texts = (query) => [...page.querySelectorAll(query)].map((element) => element.textContent);
const settle = () => new Promise((resolve) => setTimeout(resolve, 20));
const key = (name) => page.dispatchEvent(new window.KeyboardEvent("keydown", { key: name, bubbles: true }));
const click = (element) => element.dispatchEvent(new window.MouseEvent("click", { bubbles: true }));

(async () => {
  await settle();
  const told = { errors, groups: texts("#list summary"), details: texts("#details")[0] };
  told.lit = [...page.querySelectorAll("g.old, g.new")].map((g) => g.dataset.node);
  told.selected = [texts("[aria-selected=true].row")[0]];
  key("ArrowDown");
  await settle();
  told.selected.push(texts("[aria-selected=true].row")[0]);
  const node = page.querySelector("g.old");
  if (node) click(node);
  told.node = texts("#details")[0];
  key("2");
  await settle();
  told.boxes = [...page.querySelectorAll("g.node")].map((g) => g.dataset.node);
  const group = page.querySelector("g.group");
  if (group) click(group);
  await settle();
  told.opened = [...page.querySelectorAll("g.node")].map((g) => g.dataset.node);
  key("3");
  told.report = [page.getElementById("report").hidden, page.getElementById("explorer").hidden];
  told.bold = page.querySelectorAll("#explorer b").length;
  console.log(JSON.stringify(told));
})();
