// Runs the worker's code outside of a browser: `node layout.js DAGRE LAYOUT` reads a job and writes the layout, as JSON.
"use strict";
const { readFileSync } = require("fs");
const vm = require("vm");
const told = [];
const self = { postMessage: (message) => told.push(message) };
const context = vm.createContext({ self, structuredClone });
for (const path of process.argv.slice(2)) vm.runInContext(readFileSync(path, "utf8"), context);
self.onmessage({ data: JSON.parse(readFileSync(0, "utf8")) });
console.log(JSON.stringify(told[0]));
