// Runs clients on behalf of a test: fetches its commands and reports what the clients see.

import { DeviceClient } from "./device_client.mjs";

// `control` is the address of the test, `WebSocket` the constructor of this machine.
export async function drive(control, WebSocket) {
  const post = async (path, body) => {
    const answer = await fetch(control + path, { method: "POST", body: JSON.stringify(body) });
    return answer.json();
  };
  let reported = Promise.resolve(); // one after the other, so that they arrive in order
  const report = (device, event, seen = {}) => {
    reported = reported.then(() => post("/report", { device, event, ...seen }));
  };
  const commands = {
    create(device, token, base, options) {
      const client = new DeviceClient(token, base, { WebSocket, ...options });
      client.onOpen = () => report(device, "open");
      client.onMessage = (message) => report(device, "message", { message });
      client.onClose = ({ code, reason, wasClean }, delay) =>
        report(device, "closed", { code, reason, wasClean, delay });
      clients.set(device, client);
    },
    // All calls in one turn of the loop, as a program makes them.
    call(device, ...calls) {
      for (const [name, ...values] of calls) {
        report(device, "returned", { name, value: clients.get(device)[name](...values) ?? null });
      }
    },
    wait(device, milliseconds) {
      setTimeout(() => report(device, "waited"), milliseconds);
    },
    // The end of a device, also of the reconnect that may be on its way.
    drop(device) {
      clients.get(device).connect = () => {};
      clients.get(device).disconnect();
    },
    nothing() {},
  };
  const clients = new Map();
  report(0, "ready");
  for (;;) {
    const [command, device, ...values] = await post("/next", null);
    if (command === "quit") return;
    commands[command](device, ...values);
  }
}
