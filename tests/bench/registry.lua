-- What wrk asks of a registry: `wrk -s registry.lua URL -- KIND`. One thread; a request is made anew for each answer.
--   restarts  PUT /route, every one of them a new life: 64 seats in turn, a new port each time
--   repeats   PUT /route, what is known already: 64 seats in turn, always at the same address
--   rooms     POST /register_dp_rank, every one of them a new room of 63 bits
--   query     POST /query_dp_ranks, 100 rooms that `known` has announced

local kind, count = "", 0

local function known(n) return string.format("4611686018%09d", n) end

local function rank(tp, port)
  return string.format('{"attn_tp_size": 64, "attn_tp_rank": %d, "attn_cp_size": 1, "attn_cp_rank": 0, '
    .. '"attn_dp_size": 1, "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0, '
    .. '"rank_ip": "127.0.0.1", "rank_port": %d, "page_size": 16, "kv_cache_dtype": "bfloat16", "kv_layout": null, '
    .. '"dsv41_spec_layout": null, "load_balance_method": "follow_bootstrap_room", '
    .. '"enable_dsa_cache_layer_split": false, "enable_kv_cache_sharding": false, "prefill_http_port": 30000, '
    .. '"decode_allocation_policy": "early"}', tp, port)
end

function init(args)
  kind = args[1]
  wrk.headers["Content-Type"] = "application/json"
  if kind == "query" then
    local asked = {}
    for n = 1, 100 do asked[n] = known(n) end
    local body = '{"bootstrap_rooms": [' .. table.concat(asked, ", ") .. ']}'
    constant = wrk.format("POST", "/query_dp_ranks", nil, body)
  end
  math.randomseed(os.time())
  start = math.random(0, 2 ^ 30)
end

function request()
  count = count + 1
  if kind == "query" then return constant end
  if kind == "rooms" then
    local room = string.format("%d%09d", 4611686019 + start, count)
    return wrk.format("POST", "/register_dp_rank", nil, '{"bootstrap_room": ' .. room .. ', "dp_rank": ' .. count % 8 .. '}')
  end
  local seat = count % 64
  local port = kind == "restarts" and 1024 + (start + math.floor(count / 64)) % 60000 or 40000
  return wrk.format("PUT", "/route", nil, rank(seat, port + (kind == "repeats" and seat or 0)))
end
