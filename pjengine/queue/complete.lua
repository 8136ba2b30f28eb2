-- Answers the items of a claim. Only answers of items that this claim still holds are published, each once; the others
-- were cancelled, expired or given to another worker. The claim ends; what it was not answered for waits again.
-- ARGV: claim, then per item: id, answer
-- Returns how many answers were published.
local claim, ids, done, by_client, published, tokens = ARGV[1], {}, {}, {}, 0, 0
for i = 2, #ARGV, 2 do
  ids[#ids + 1] = ARGV[i]
end
for first = 1, #ids, CHUNK do
  local last = math.min(first + CHUNK - 1, #ids)
  for i, packed in ipairs(redis.call('HMGET', ITEMS, unpack(ids, first, last))) do
    local item, index = packed and read_item(packed), first + i - 1
    if item and item.claim == claim then
      local answers = by_client[item.client] or {}
      by_client[item.client] = answers
      answers[#answers + 1] = ARGV[2 * index + 1]
      done[#done + 1] = ids[index]
      tokens = tokens + item.tokens
    end
  end
end
for client, answers in pairs(by_client) do
  if client_lives(client) then
    in_chunks('RPUSH', RESULTS .. client, answers)
    published = published + #answers
  end
end
in_chunks('HDEL', ITEMS, done)
in_chunks('HDEL', PAYLOADS, done)
in_chunks('ZREM', DEADLINES, done)
count('answered', published)
count('answered_tokens', tokens)
count('stale_answers', #ids - published)
lapse(claim, true)
return published
