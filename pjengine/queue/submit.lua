-- Queues the items of one request, all or none.
-- ARGV: client, most items that may wait, most deliveries, then per item: id, class, tokens, ms until its deadline, payload
-- Returns {'ok'}, {'full', waiting} or {'lost'}: the client's lease has ended, or Redis has forgotten it.
local client, limit, max_deliveries = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local n = (#ARGV - 3) / 5
if not client_lives(client) then
  return { 'lost' }
end
local waiting = redis.call('ZCARD', WAITING.query) + redis.call('ZCARD', WAITING.document)
if waiting + n > limit then
  count('refused', n)
  return { 'full', waiting }
end
local seq = redis.call('HINCRBY', COUNTERS, 'submitted', n) - n
local items, payloads, deadlines, waiting = {}, {}, {}, { query = {}, document = {} }
for i = 4, #ARGV, 5 do
  local id, class, tokens, timeout, payload = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), ARGV[i + 4]
  seq = seq + 1
  local item = {
    tokens = tokens, class = class, client = client, seq = seq,
    deliveries = 0, max_deliveries = max_deliveries, claim = '',
  }
  append(items, id, write_item(item))
  append(payloads, id, payload)
  append(deadlines, now + timeout, id)
  append(waiting[class], seq, id)
end
in_chunks('HSET', ITEMS, items, 2)
in_chunks('HSET', PAYLOADS, payloads, 2)
in_chunks('ZADD', DEADLINES, deadlines, 2)
in_chunks('ZADD', WAITING.query, waiting.query, 2)
in_chunks('ZADD', WAITING.document, waiting.document, 2)
wake()
return { 'ok' }
