// Run clients side by side: the argument names their modules and keys, in phases; an answer is one line of JSON.
import { pathToFileURL } from "node:url";

const order = { name: "tea" };

async function load([name, file, key]) {
  const { default: placeOrder } = await import(pathToFileURL(file));
  return [name, placeOrder, key ?? undefined];
}

async function run([name, placeOrder, key]) {
  const begin = performance.now();
  let answer;
  try {
    answer = { id: (await placeOrder(order, key)).id };
  } catch (error) {
    answer = { error: error.constructor.name };
  }
  console.log(JSON.stringify({ case: name, seconds: (performance.now() - begin) / 1000, ...answer }));
}

const phases = await Promise.all(JSON.parse(process.argv[2]).map((phase) => Promise.all(phase.map(load))));
for (const clients of phases) {
  await Promise.all(clients.map(run));
}
process.exit(); // some clients keep their connections, and with them the process
