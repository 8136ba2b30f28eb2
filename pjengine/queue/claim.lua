-- Peeks at what waits, sums the token counts and claims a batch: at least one item, then in order of arrival as long as
-- the tokens fit the budget. Queries come first; documents take what is left, at most `document_budget` tokens.
-- Two rules bend the order. A document whose turn has come (TURN claims in a row passed documents over) goes first;
-- only one. And an item on its last delivery is claimed alone, by a worker that has nothing else: if the
-- worker dies of it, nothing innocent goes with it.
-- ARGV: claim, token budget, most items, document_budget, visibility ms, claims that the worker has in hand
-- Returns {alone (0 or 1), item, payload, item, payload, ...}; only {0} if there is nothing to claim.
local TURN = 8
local PEEK = 128
local claim, budget, max_items = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local document_budget, visibility, in_hand = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

sweep()

local taken, tokens, alone, blocked = {}, 0, false, false
local passed = { query = 0, document = 0 }  -- items of a class that were taken: they leave its set at the end

-- Goes through a class in order of arrival, `most` items and `limit` tokens of the batch at most.
local function take(class, most, limit)
  while not (alone or blocked) do
    local ids = redis.call('ZRANGE', WAITING[class], passed[class], passed[class] + PEEK - 1)
    if #ids == 0 then
      return
    end
    local packed = redis.call('HMGET', ITEMS, unpack(ids))
    for i, id in ipairs(ids) do
      local item = packed[i] and read_item(packed[i])
      if not item then
        redis.call('ZREM', WAITING[class], id)
      elseif not client_lives(item.client) then
        forget(id, item)
        count('abandoned')
      else
        local last = item.deliveries > 0 and item.deliveries + 1 >= item.max_deliveries
        if #taken >= max_items or most == 0 then
          return
        elseif #taken > 0 and (last or tokens + item.tokens > limit) then
          return
        elseif last and in_hand > 0 then
          blocked = true
          return
        end
        taken[#taken + 1] = { id = id, item = item }
        tokens, most, passed[class], alone = tokens + item.tokens, most - 1, passed[class] + 1, last
        if alone then
          return
        end
      end
    end
  end
end

local documents = redis.call('ZCARD', WAITING.document)
local overtaken = tonumber(redis.call('HGET', COUNTERS, 'overtaken') or 0)
if overtaken >= TURN then
  take('document', 1, budget)
end
take('query', max_items, budget)
take('document', max_items, math.min(budget, tokens + document_budget))

if #taken == 0 then
  return { 0 }
end

local ids, rewritten, waiting = {}, {}, { query = {}, document = {} }
for i, entry in ipairs(taken) do
  local item = entry.item
  item.claim, item.deliveries = claim, item.deliveries + 1
  ids[i] = entry.id
  append(rewritten, entry.id, write_item(item))
  table.insert(waiting[item.class], entry.id)
end
in_chunks('HSET', ITEMS, rewritten, 2)
in_chunks('ZREM', WAITING.query, waiting.query)
in_chunks('ZREM', WAITING.document, waiting.document)
redis.call('HSET', CLAIM_ITEMS, claim, cmsgpack.pack(ids))
redis.call('ZADD', CLAIMS, now + visibility, claim)
count('claims')
count('claimed_tokens', tokens)
redis.call('HSET', COUNTERS, 'overtaken', (#waiting.document > 0 or documents == 0) and 0 or overtaken + 1)
if redis.call('ZCARD', WAITING.query) + redis.call('ZCARD', WAITING.document) > 0 then
  wake()
end

local reply = { alone and 1 or 0 }
for first = 1, #ids, CHUNK do
  local last = math.min(first + CHUNK - 1, #ids)
  for i, payload in ipairs(redis.call('HMGET', PAYLOADS, unpack(ids, first, last))) do
    append(reply, ids[first + i - 1], payload)
  end
end
return reply
