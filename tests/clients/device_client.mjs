// A device's client as fleets already run it, in browsers and in Node.js with the package `ws`.
//
// Its habits are what the gateway must live with: the token in the URL, JSON envelopes with the
// time of `toISOString()`, a `ping` message as heartbeat, and a reconnect after every close but
// 1000, later each time. It reads no close code beyond that, and no Retry-After.

const LONGEST_SERIES = 5; // reconnects in a row without a connection that opened

export class DeviceClient {
  #url;
  #options;
  #socket = null;
  #failures = 0;
  #heart = null;

  // `heartbeat` and `backoff` are milliseconds; `WebSocket` is the constructor to use.
  constructor(token, base, { WebSocket, heartbeat = 30_000, backoff = 1_000 }) {
    this.#url = `${base}/ws/device/?token=${token}`;
    this.#options = { WebSocket, heartbeat, backoff };
    this.onOpen = this.onMessage = this.onClose = () => {};
  }

  connect() {
    const socket = new this.#options.WebSocket(this.#url);
    this.#socket = socket;
    socket.onopen = () => {
      this.#failures = 0;
      this.#heart = setInterval(() => this.send("ping", {}), this.#options.heartbeat);
      this.onOpen();
    };
    socket.onmessage = ({ data }) => this.onMessage(JSON.parse(data));
    socket.onerror = () => {}; // a close event follows; `ws` throws where nobody listens
    socket.onclose = (event) => {
      clearInterval(this.#heart);
      this.onClose(event, this.#comeBack(event.code));
    };
  }

  // The user's wish: the gateway echoes 1000 and the client stays away.
  disconnect() {
    this.#socket?.close(1000, "用户离线");
  }

  // Whether the message was handed to an open socket.
  send(type, message) {
    if (this.#socket?.readyState !== this.#options.WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify({ type, message, timestamp: new Date().toISOString() }));
    return true;
  }

  chat(text) {
    return this.send("chat_message", text);
  }

  weather(city) {
    return this.send("weather", { city });
  }

  sing(song, artist) {
    return this.send("sing", { song, artist });
  }

  dance(dance, style, duration = "30秒") {
    return this.send("dance", { dance, style, duration });
  }

  // Milliseconds until the next try, or null if there is none.
  #comeBack(code) {
    if (code === 1000 || this.#failures >= LONGEST_SERIES) return null;
    this.#failures += 1;
    const delay = 2 ** this.#failures * this.#options.backoff;
    setTimeout(() => this.connect(), delay);
    return delay;
  }
}
