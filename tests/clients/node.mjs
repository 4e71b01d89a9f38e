// The machine Node.js: node node.mjs ADDRESS-OF-THE-TEST FOLDER-WITH-node_modules

import { createRequire } from "node:module";

import { drive } from "./driver.mjs";

const [control, packages] = process.argv.slice(2);
await drive(control, createRequire(`${packages}/`)("ws"));
process.exit(0);
